"""The command line: names, options and exit codes. What a command does is in `commands/`, imported on call.

Nothing here imports torch or transformers, so `--help` answers at once. Every way to end goes through `main`:
what a person can put right is one line on stderr and exit 2 to 7 (`durable.ExitCode`), a fault of ours one
line and exit 1, Ctrl-C 130, SIGTERM 143.
"""

import gc
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from wrinklefree import __version__

if TYPE_CHECKING:
    from durable import UserError

app = typer.Typer(
    name="wrinklefree",
    help="Pretrained decoders to ternary models that run fast on a plain CPU, proven at every step.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

OVERRIDES = typer.Argument(metavar="[KEY=VALUE]...", help="Such as model=tiny_llama training=unified.")
KEEP_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"wrinklefree {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


@app.command()
def demo(
    keep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep what the demo saves; it must not exist yet.")
    ] = None,
) -> None:
    """Train a tiny ternary decoder, save it, reload it.

    It learns to sort eight digits, offline, within two minutes of CPU time; stock transformers reads it back.
    """
    from wrinklefree.commands.demo import demo as run

    run(keep=keep)


@app.command()
def convert(
    model: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face directory, a hub name, a .gguf file, or tiny_llama and its like."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The directory to write; it must not exist yet or be empty.")],
    subln: Annotated[
        Literal["off", "output", "all"],
        typer.Option(help="Add norms in front of o and down, or of every projection."),
    ] = "off",
    init: Annotated[
        Literal["ones", "calibrated"],
        typer.Option(help="Gains of the added norms; calibrated keeps the model alive."),
    ] = "ones",
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text to calibrate on, for --init calibrated.")
    ] = None,
    hidden_act: Annotated[
        Literal["keep", "relu2"], typer.Option(help="The activation of the feed-forward part.")
    ] = "keep",
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A projection to leave dense (name, path or glob); repeatable."),
    ] = None,
    layout: Annotated[
        Literal["training", "stock"],
        typer.Option(help="For training with bitnet_arch, or for stock transformers."),
    ] = "training",
    packed: Annotated[bool, typer.Option("--packed", help="Two bits per weight (stock layout).")] = False,
) -> None:
    """Make a pretrained decoder ternary and save it."""
    from wrinklefree.commands.convert import convert as run

    run(
        model,
        out,
        subln=subln,
        init=init,
        calibration=calibration,
        hidden_act=hidden_act,
        exclude=tuple(exclude or ()),
        layout=layout,
        packed=packed,
    )


@app.command(context_settings=KEEP_OVERRIDES)
def train(
    overrides: Annotated[list[str] | None, OVERRIDES] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the whole configuration and stop.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what the run would take, in memory and time, and stop.")
    ] = False,
) -> int:
    """Train a ternary decoder; the same command again goes on where it stopped.

    Keys and their defaults: docs/configuration_guide.md.
    """
    gc.disable()  # importing torch and transformers makes a million objects, and none of them is garbage
    from wrinklefree.commands.train import train as run

    gc.enable()
    return run(list(overrides or ()), print_config=print_config, dry_run=dry_run)


@app.command("eval")
def evaluate(
    path: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="The directory of either.")],
    data: Annotated[str | None, typer.Option(metavar="NAME", help="Another data config.")] = None,
    batches: Annotated[int, typer.Option(min=1, help="Batches of 8 blocks for each domain.")] = 8,
) -> None:
    """Held-out loss and perplexity of every domain, as saved and fully ternary."""
    from wrinklefree.commands.evaluate import evaluate as run

    run(path, data=data, num_batches=batches)


MODEL = typer.Argument(
    metavar="MODEL",
    help="The directory of a run or a checkpoint, a .gguf file (llama.cpp), or what convert takes.",
)
MODE = typer.Option(help="Token after token, or block diffusion (a model trained with dlm).")
MAX_NEW_TOKENS = typer.Option(metavar="N", help="128, or as many as the model has positions for.")
TEMPERATURE = typer.Option(help="0 takes the likeliest token.")
TOP_P = typer.Option(help="Draw from the likeliest tokens with this probability together.")
SEED = typer.Option(help="Of the draws.")
THRESHOLD = typer.Option(help="Diffusion: take tokens with more confidence together.")
SUB_BLOCK = typer.Option(metavar="N", help="Diffusion: tokens filled in from left to right at once; 8.")
PREFIX_CACHE = typer.Option("--prefix-cache/--no-prefix-cache", help="Keep keys and values of what was read.")
STREAM = typer.Option("--stream/--no-stream", help="Print text as it comes.")


@app.command()
def generate(
    model: Annotated[str, MODEL],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="Go on from it; repeatable. Else from stdin."),
    ] = None,
    mode: Annotated[Literal["ar", "diffusion"], MODE] = "ar",
    max_new_tokens: Annotated[int | None, MAX_NEW_TOKENS] = None,
    temperature: Annotated[float, TEMPERATURE] = 0.0,
    top_p: Annotated[float, TOP_P] = 1.0,
    seed: Annotated[int, SEED] = 0,
    threshold: Annotated[float, THRESHOLD] = 0.9,
    sub_block: Annotated[int | None, SUB_BLOCK] = None,
    prefix_cache: Annotated[bool, PREFIX_CACHE] = True,
    stream: Annotated[bool, STREAM] = True,
) -> None:
    """Write what follows a prompt, and say how fast it came."""
    from wrinklefree.decoding import Decoding

    if model.endswith(".gguf"):
        from wrinklefree.commands.engine import generate as run
    else:
        from wrinklefree.commands.generate import generate as run

    decoding = Decoding(
        mode=mode,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        threshold=threshold,
        sub_block=sub_block,
        prefix_cache=prefix_cache,
    )
    run(model, prompts=prompt or (), decoding=decoding, stream=stream)


@app.command()
def chat(
    model: Annotated[str, MODEL],
    mode: Annotated[Literal["ar", "diffusion"], MODE] = "ar",
    max_new_tokens: Annotated[int | None, MAX_NEW_TOKENS] = None,
    temperature: Annotated[float, TEMPERATURE] = 0.0,
    top_p: Annotated[float, TOP_P] = 1.0,
    seed: Annotated[int, SEED] = 0,
    threshold: Annotated[float, THRESHOLD] = 0.9,
    sub_block: Annotated[int | None, SUB_BLOCK] = None,
    prefix_cache: Annotated[bool, PREFIX_CACHE] = True,
    stream: Annotated[bool, STREAM] = True,
) -> None:
    """Talk with a model that has a chat template.

    Ctrl-C stops an answer; /exit, the end of the input, or Ctrl-C at the prompt end the chat.
    """
    from wrinklefree.decoding import Decoding

    if model.endswith(".gguf"):
        from wrinklefree.commands.engine import chat as run
    else:
        from wrinklefree.commands.chat import chat as run

    decoding = Decoding(
        mode=mode,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        threshold=threshold,
        sub_block=sub_block,
        prefix_cache=prefix_cache,
    )
    run(model, decoding=decoding, stream=stream)


GGUF_FILE = typer.Argument(metavar="FILE", help="A .gguf file that llama.cpp runs.")
THREADS = typer.Option(min=1, metavar="N", help="As many as this process may use.")


@app.command()
def serve(
    file: Annotated[Path, GGUF_FILE],
    host: Annotated[
        str, typer.Option(help="The address to listen on; any other opens it to other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8080,
    threads: Annotated[int | None, THREADS] = None,
    context: Annotated[
        int, typer.Option(min=16, metavar="N", help="Tokens of a request with its answer, up to the model's.")
    ] = 4096,
    slots: Annotated[
        int, typer.Option(min=1, max=64, metavar="N", help="Requests answered at once; others wait.")
    ] = 4,
    lora: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A low-rank correction, as a GGUF adapter.")
    ] = None,
) -> None:
    """Serve a .gguf file with the OpenAI API: /v1/completions, /v1/chat/completions, /v1/models, /health.

    Ctrl-C or SIGTERM ends it.
    """
    from bitnet_serving.service import serve as run

    run(file, host=host, port=port, threads=threads, context=context, slots=slots, lora=lora)


@app.command()
def bench(
    file: Annotated[Path, GGUF_FILE],
    threads: Annotated[int | None, THREADS] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Read at once, for prefill.")] = 512,
    new_tokens: Annotated[
        int, typer.Option(min=2, metavar="N", help="Written one by one, for decoding.")
    ] = 64,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="The medians are printed.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """How fast a .gguf file runs here, and what share of the machine's memory bandwidth that is."""
    from bitnet_serving.bench import bench as run

    measured = run(file, threads=threads, prompt_tokens=prompt_tokens, new_tokens=new_tokens, rounds=rounds)
    print(measured.to_json() if as_json else measured)


config_app = typer.Typer(
    help="Look at the configuration of a run.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(config_app, name="config")


@config_app.command("show", context_settings=KEEP_OVERRIDES)
def config_show(overrides: Annotated[list[str] | None, OVERRIDES] = None) -> None:
    """Print every key with its value."""
    from wrinklefree.commands.config import show

    show(list(overrides or ()))


@config_app.command("validate", context_settings=KEEP_OVERRIDES)
def config_validate(overrides: Annotated[list[str] | None, OVERRIDES] = None) -> None:
    """Say whether a configuration holds."""
    from wrinklefree.commands.config import validate

    validate(list(overrides or ()))


@config_app.command("schema")
def config_schema() -> None:
    """Print every key: what it accepts, its default, what it is for."""
    from wrinklefree.commands.config import schema

    schema()


runs_app = typer.Typer(help="Look at runs.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(runs_app, name="runs")


@runs_app.command("list")
def runs_list(directory: Annotated[Path, typer.Argument(help="An output_dir.")] = Path("outputs")) -> None:
    """One line for each run."""
    from wrinklefree.commands.runs import list_runs

    list_runs(directory)


@runs_app.command("show")
def runs_show(run: Annotated[Path, typer.Argument(help="The directory of a run.")]) -> None:
    """Steps, losses, resumes and checkpoints of a run."""
    from wrinklefree.commands.runs import show

    show(run)


@runs_app.command("diff")
def runs_diff(one: Annotated[Path, typer.Argument()], other: Annotated[Path, typer.Argument()]) -> None:
    """Keys and losses in which two runs differ."""
    from wrinklefree.commands.runs import diff

    diff(one, other)


@runs_app.command("rm")
def runs_rm(
    run: Annotated[Path, typer.Argument(help="The directory of a run.")],
    outputs: Annotated[Path, typer.Option(metavar="DIR", help="The output_dir that it must lie in.")] = Path(
        "outputs"
    ),
    yes: Annotated[bool, typer.Option("--yes", help="Really remove it.")] = False,
) -> None:
    """Remove a run with all its checkpoints."""
    from wrinklefree.commands.runs import remove

    remove(run, outputs=outputs, yes=yes)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False) -> None:
    """Say what this machine has and how it multiplies.

    Versions, instruction sets, GPU, compiler, space, credentials (set or not), and the route of BitLinear.
    """
    from wrinklefree.commands.doctor import doctor as run

    run(as_json=as_json)


@app.command(
    add_help_option=False,  # the commands behind it have their own
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def data(context: typer.Context) -> None:
    """Prepare training data and look at it: list, show, prepare, preview, stats, verify, score, reweight."""
    from data_handler.cli import app as data_app

    data_app(context.args or ["--help"], prog_name="wrinklefree data", standalone_mode=False)


@app.command(
    add_help_option=False,  # the commands behind it have their own
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def export(context: typer.Context) -> None:
    """Write a checkpoint for others: gguf for engines, hf for transformers, hub."""
    from bitnet_serving.cli import export_app

    export_app(context.args or ["--help"], prog_name="wrinklefree export", standalone_mode=False)


@app.command(
    add_help_option=False,  # the command behind it has its own
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def verify(context: typer.Context) -> int:
    """Prove that an exported file says what a checkpoint says, in a real engine too."""
    from bitnet_serving.cli import app as serving_app

    arguments = context.args or ["--help"]
    code = serving_app(["verify", *arguments], prog_name="wrinklefree", standalone_mode=False)
    return code if isinstance(code, int) else 0


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and end the process with its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Wherever it stands: people add it at the end of the command that just failed.
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    signal.signal(signal.SIGTERM, _end_on_sigterm)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    sys.exit(_exit_code(arguments, debug=debug))


def _exit_code(arguments: list[str], *, debug: bool) -> int:
    try:
        code = app(arguments or ["--help"], prog_name="wrinklefree", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`| head`) has gone; Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        return _report(error, debug=debug)
    if code == 130:
        print("interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _report(error: Exception, *, debug: bool) -> int:
    """Print one line about an error, with its traceback in front if asked for; the exit code to end with."""
    from durable import UserError, error_line, mask_secrets

    if debug:
        print(mask_secrets("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    if isinstance(error, typer.TyperException):
        error = _usage_error(error)
    if isinstance(error, UserError):
        print(error_line(error), file=sys.stderr)
        return error.exit_code
    advice = "" if debug else "; run with --debug for the traceback"
    print(f"{error_line(error)}{advice}", file=sys.stderr)
    return 1


def _usage_error(error: typer.TyperException) -> "UserError":
    """What typer has to say about the command line, in our form: one line, with "did you mean"."""
    from durable import UserError

    context: Any = getattr(error, "ctx", None)
    fix = f"see '{context.command_path if context else 'wrinklefree'} --help'"
    option = getattr(error, "option_name", None)
    if context and option and error.message.startswith("No such option"):
        options = [
            name for parameter in context.command.params for name in parameter.opts if name.startswith("--")
        ]
        return UserError("no such option", found=option, fix=fix, choices=[*options, "--help"])
    return UserError(error.format_message().rstrip(".").replace("Value error, ", ""), fix=fix)


def _end_on_sigterm(signum: int, frame: FrameType | None) -> NoReturn:
    # Unwinds, so that temporary directories go and locks are released.
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    main()
