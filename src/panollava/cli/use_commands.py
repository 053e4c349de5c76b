"""The commands that use a trained model: their options, and calling them."""

import argparse
import contextlib
import gc
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from panollava import paths
from panollava.errors import UserError

if TYPE_CHECKING:  # torch is slow to import, and `--help` does not need it
    from panollava.model.generate import Sampling
    from panollava.model.panollava import PanoLLaVA

_DEFAULT = paths.weights_file("finetune")


def add_ask(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "arguments",
        nargs="+",
        metavar="PANORAMA|QUESTION",
        help="panoramas (files or folders of them), and questions about each",
    )
    add_model_options(command)
    add_sampling_options(command)
    add("--json", action="store_true", help="print one JSON object per line")


def ask(options: argparse.Namespace) -> None:
    with _starting():
        from panollava.serving.ask import ask, split_arguments

        panoramas, questions = split_arguments(options.arguments)
        sampling = sampling_of(options)
        model = load(options)
    ask(model, panoramas, questions, options.max_new_tokens, sampling, options.json)


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """Without garbage collection: imports and loading create many objects and hardly any garbage,
    and searching them takes a tenth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def add_serve(command: argparse.ArgumentParser) -> None:
    _add_listening(command)
    add = command.add_argument
    add("--name", default="panollava", help="the model's name in requests (default: panollava)")
    add_model_options(command)
    help = "tokens of an answer whose request names no number (default: 64)"
    add("--max-new-tokens", type=int, default=64, metavar="N", help=help)
    help = "questions answered at once; lower it if memory runs out (default: 16)"
    add("--batch-size", type=int, default=16, metavar="N", help=help)
    help = "largest request (default: 64 MiB)"
    add("--max-bytes", type=int, default=1 << 26, metavar="N", help=help)
    help = "largest picture (default: 2^27, 16384 x 8192)"
    add("--max-pixels", type=int, default=1 << 27, metavar="N", help=help)


def serve(options: argparse.Namespace) -> None:
    from panollava.serving.server import Limits, serve

    for name in Limits._fields:
        value = getattr(options, name)
        _check(name, value, value >= 1, "at least 1")
    with _listening(options) as listener:
        limits = Limits(*(getattr(options, name) for name in Limits._fields))
        hosts = (options.host, *options.allow_host)
        serve(load(options), listener, options.name, hosts, limits)


def add_look(command: argparse.ArgumentParser) -> None:
    command.add_argument("--open", action="store_true", help="open the page in a browser, too")
    _add_listening(command)
    add_model_options(command)
    add_length_option(command)


def look(options: argparse.Namespace) -> None:
    from panollava.serving.look import look
    from panollava.serving.server import Limits

    _check("max_new_tokens", options.max_new_tokens, options.max_new_tokens >= 1, "at least 1")
    with _listening(options) as listener:
        limits = Limits(max_new_tokens=options.max_new_tokens)
        hosts = (options.host, *options.allow_host)
        look(load(options), str(options.model), listener, hosts, limits, options.open)


def _add_listening(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--port", type=int, default=8000, metavar="N", help="default: 8000; 0: any free one")
    help = "address to listen on (default: 127.0.0.1, which only this machine reaches)"
    add("--host", default="127.0.0.1", metavar="ADDRESS", help=help)
    help = "another host name that requests may use, in addition to localhost; may be repeated"
    add("--allow-host", action="append", default=[], metavar="NAME", help=help)


def _listening(options: argparse.Namespace) -> socket.socket:
    """A socket, before the model is loaded: a port may be taken."""
    from panollava.serving.server import bind

    _check("port", options.port, 0 <= options.port < 2**16, "from 0 to 65535")
    return bind(options.host, options.port)


def add_export(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("out", type=Path, metavar="OUT", help="new folder to write")
    add_model_options(command, runs=False)
    one = command.add_mutually_exclusive_group().add_argument
    help = "leave the language model's weights where they are, and load them from there"
    one("--refer-to-towers", action="store_true", help=help)
    help = "write only the language model's adapter, as a folder that peft loads"
    one("--adapter", action="store_true", help=help)


def export(options: argparse.Namespace) -> None:
    from panollava.serving.export import export, export_adapter, result_file

    result = result_file(options.model)
    if options.adapter:
        export_adapter(load(options), result, options.out)
    else:
        export(load(options), result, options.out, options.refer_to_towers)


def add_model_options(command: argparse.ArgumentParser, runs: bool = True) -> None:
    """The options of every command that loads a trained model, and of those that run it."""
    add = command.add_argument
    help = f"a result of resampler or finetune (default: {_DEFAULT})"
    add("--model", type=Path, default=_DEFAULT, metavar="PATH", help=help)
    for name in ("encoder", "language-model"):
        help = f"folder or hub id of the {name.replace('-', ' ')}, if it is elsewhere now"
        add(f"--{name}", metavar="PATH", help=help)
    if runs:
        add("--accelerator", choices=("cpu", "gpu", "auto"), default="auto", help="default: auto")
    else:
        command.set_defaults(accelerator="cpu")
    help = "run code that comes with the weights of a tower"
    add("--trust-remote-code", action="store_true", help=help)


def add_sampling_options(command: argparse.ArgumentParser) -> None:
    add_length_option(command)
    add = command.add_argument
    help = "above 0: sample answers, the more varied the higher (default: 0, the likeliest words)"
    add("--temperature", type=float, default=0.0, metavar="T", help=help)
    help = "sample among the likeliest tokens of this probability together (default: 1)"
    add("--top-p", type=float, default=1.0, metavar="P", help=help)
    add("--seed", type=int, default=0, metavar="N", help="of the sampling (default: 0)")


def add_length_option(command: argparse.ArgumentParser) -> None:
    help = "tokens of an answer, at most (default: 64)"
    command.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help=help)


def load(options: argparse.Namespace) -> "PanoLLaVA":
    from transformers.utils import logging

    from panollava.model.panollava import PanoLLaVA

    logging.disable_progress_bar()
    return PanoLLaVA.from_pretrained(
        options.model,
        encoder=options.encoder,
        language_model=options.language_model,
        accelerator=options.accelerator,
        trust_remote_code=options.trust_remote_code,
    )


def sampling_of(options: argparse.Namespace) -> "Sampling":
    from panollava.model.generate import Sampling

    for name, valid, expected in (
        ("max_new_tokens", options.max_new_tokens >= 1, "at least 1"),
        ("temperature", 0 <= options.temperature < float("inf"), "a number from 0"),
        ("top_p", 0 < options.top_p <= 1, "a number above 0, at most 1"),
        ("seed", 0 <= options.seed < 2**32, "from 0 to 4294967295"),
    ):
        _check(name, getattr(options, name), valid, expected)
    return Sampling(options.temperature, options.top_p, options.seed)


def _check(name: str, value: object, valid: bool, expected: str) -> None:
    if not valid:
        raise UserError(f"--{name.replace('_', '-')}: expected {expected}, found {value}")
