"""The device is checked, frozen layers in bf16 change no result, and freed memory is reused."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers import ROWS, packed_loss, random_views, settings_for
from panollava.data.dialogue import Dialogue
from panollava.errors import UserError
from panollava.model.device import choose_device
from panollava.model.panollava import build_model
from panollava.model.precision import autocast, cast_frozen_linears

TRAINS = ("encoder", "resampler", "projector")
_PROGRAM = """
import resource, sys
import torch
from panollava.model.device import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        for size in (1 << 22, 1 << 24):  # floats: 16 and 64 MB
            torch.ones(size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

default = faults()
keep_freed_memory()
faults()
print(default, faults())
"""


def test_a_missing_gpu_is_an_error_only_if_it_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("cpu") == choose_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match=r"trainer\.accelerator is gpu.*set it to cpu or auto"):
        choose_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("gpu") == choose_device("auto") == torch.device("cuda")
    assert choose_device("cpu") == torch.device("cpu")


def test_frozen_linears_cast_to_bf16_compute_what_autocast_does(towers: Path) -> None:
    settings = settings_for(towers)
    model, tokenizer = build_model(settings.model, settings.views, seed=0)
    model.eval().language_model.requires_grad_(False)
    dialogue = Dialogue(tokenizer, 64)

    def loss_and_gradients() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        with autocast(torch.device("cpu"), "bf16-mixed"):
            loss = packed_loss(model, dialogue, random_views(2), ROWS)
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return loss.detach(), grads

    def bf16() -> set[str]:
        return {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}

    loss, grads = loss_and_gradients()
    cast_frozen_linears(model, "32-true", keep=TRAINS)
    assert not bf16()
    cast_frozen_linears(model, "bf16-mixed", keep=TRAINS)
    cast_loss, cast_grads = loss_and_gradients()
    assert torch.equal(loss, cast_loss) and grads.keys() == cast_grads.keys() != set()
    assert all(torch.equal(grads[name], cast_grads[name]) for name in grads)
    assert bf16() and all(name.startswith("language_model.") for name in bf16())
    assert not any("embed" in name or "norm" in name for name in bf16())
    # The head is tied to the embeddings.
    assert model.language_model.get_input_embeddings().weight.dtype == torch.float32


def _faults(**environment: str) -> tuple[int, int]:
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")
    }
    command = [sys.executable, "-c", _PROGRAM]
    out = subprocess.check_output(command, env={**inherited, **environment}, text=True)
    before, after = map(int, out.split())
    return before, after


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only for glibc")
def test_freed_memory_is_reused() -> None:
    before, after = _faults()
    assert before > 1000
    assert after < 0.01 * before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only for glibc")
def test_malloc_variables_of_the_environment_take_precedence() -> None:
    before, after = _faults(MALLOC_ARENA_MAX="2")
    assert after > 0.5 * before > 500
