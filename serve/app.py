"""The commands and their options; what they do is imported when they run."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from jaxpaged import __version__
from jaxpaged.serve.bench_serve.options import BenchServeOptions
from jaxpaged.serve.commands import command
from jaxpaged.serve.options import EngineOptions, SamplingOptions
from jaxpaged.serve.server.options import ServerOptions

app = typer.Typer(
    name="jaxpaged",
    help="Paged-KV inference of language models in JAX.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(help="Measure the engine, or a server, on a workload.", no_args_is_help=True)
app.add_typer(bench, name="bench")

WORKLOAD_HELP = (
    'JSON: a list of {"prompt": text or token ids, "out": tokens to generate}, '
    "or an object of such lists by name."
)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Paged-KV inference of language models in JAX."""
    if version:
        print(f"jaxpaged {__version__}")
        raise typer.Exit


@command(app)
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Texts to complete.")] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option(
            "--file",
            "-f",
            help="A file that is a prompt, or .jsonl with one a line; '-' is stdin; repeatable.",
        ),
    ] = None,
    stream: Annotated[bool, typer.Option(help="Print the text as it comes.")] = True,
    echo: Annotated[
        bool | None,
        typer.Option(help="Print the prompts too. [dim]Default: on a terminal.[/]", show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line for each prompt.")] = False,
    *,
    sampling: SamplingOptions,
    engine: EngineOptions,
) -> None:
    """Complete prompts: arguments, files, or standard input."""
    from jaxpaged.serve.generate import run_generate
    from jaxpaged.serve.prompts import read_prompts

    run_generate(read_prompts(prompts, file), sampling, engine, stream=stream, echo=echo, as_json=json)


@command(app)
def chat(
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    *,
    sampling: SamplingOptions,
    engine: EngineOptions,
) -> None:
    """Talk with the model in the terminal."""
    from jaxpaged.serve.chat import run_chat

    run_chat(system, sampling, engine)


@command(app)
def serve(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="MODEL", help="Folder of a Hugging Face checkpoint; the same as --model."),
    ] = None,
    *,
    server: ServerOptions,
    engine: EngineOptions,
) -> None:
    """Serve a model over HTTP, compatible with OpenAI's API."""
    from jaxpaged.serve.server.run import run_serve

    if folder is not None and engine.model is not None:
        raise ValueError(f"MODEL={folder}: --model={engine.model} says otherwise")
    run_serve(server, engine if folder is None else dataclasses.replace(engine, model=folder))


@command(app)
def info(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    *,
    engine: EngineOptions,
) -> None:
    """Show devices, versions, the model, the KV pool and the buckets."""
    from jaxpaged.serve.info import run_info

    run_info(engine, as_json=json)


@command(app)
def demo(
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each completion.")] = 64,
    *,
    engine: EngineOptions,
) -> None:
    """See the engine at work: several texts in one batch, shared blocks, a table."""
    from jaxpaged.serve.demo import run_demo

    run_demo(max_tokens, engine)


@command(bench, "throughput")
def throughput(
    file: Annotated[Path, typer.Argument(metavar="WORKLOAD", help=WORKLOAD_HELP)],
    workload: Annotated[
        str | None, typer.Option("--workload", "-w", help="Name of the list in the file.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measured runs, after one that is not.")] = 3,
    json: Annotated[Path | None, typer.Option("--json", help="File for all figures.")] = None,
    *,
    engine: EngineOptions,
) -> None:
    """Send all requests at once: how many tokens a second?"""
    from jaxpaged.serve.bench import run_bench

    run_bench("throughput", file, workload, repeats, json, engine)


@command(bench, "latency")
def latency(
    file: Annotated[Path, typer.Argument(metavar="WORKLOAD", help=WORKLOAD_HELP)],
    workload: Annotated[
        str | None, typer.Option("--workload", "-w", help="Name of the list in the file.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measured runs, after one that is not.")] = 3,
    json: Annotated[Path | None, typer.Option("--json", help="File for all figures.")] = None,
    *,
    engine: EngineOptions,
) -> None:
    """Send one request at a time: how long does each token take?"""
    from jaxpaged.serve.bench import run_bench

    run_bench("latency", file, workload, repeats, json, engine)


@command(bench, "serve")
def bench_serve(*, options: BenchServeOptions) -> None:
    """Send a workload to any OpenAI-compatible server: what do its clients see?"""
    from jaxpaged.serve.bench_serve.run import run_bench_serve

    run_bench_serve(options)
