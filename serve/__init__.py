"""The command line: generate, chat, bench, info and demo, each over one ``Engine``."""
