"""``python -m jaxpaged.serve``: the command line without an installed script."""

from jaxpaged.serve.cli import main

if __name__ == "__main__":
    main()
