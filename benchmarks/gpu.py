"""The real profile (`presets/quic360.yaml`, model.tokens: views) on one CUDA GPU, in bf16, with
random weights: training steps in the usual way and in ours (eager, recorded as CUDA graphs, with
compiled layers), whether they leave the same bytes, attention with our mask, and answers.

The usual way is one padded sequence per row through `transformers`' model with logits everywhere,
and one `generate` per row; under the same autocast, not compiled, with any kernels.

Each section is guarded and each figure is written at once to a file of JSON lines (--lines). After
--minutes no further section starts. --tiny runs all of it with tiny towers on a processor, where
programs are run again instead of replayed: to see that it works."""

import contextlib
import gc
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import evaluation
import gpu_project
import real_size
from measure import ROOT, Line, format_table, options_parser, report, time_alternately
from panollava.data.batches import StepBatch, tree_sum
from panollava.data.packing import attention_mask
from panollava.data.shapes import Shape
from panollava.model.precision import autocast
from panollava.stages import STAGES
from panollava.training.cuda_graphs import Recorder, Rerun, StepGraphs
from panollava.training.objective import load_objective, one_device, prepare_parts
from panollava.training.tower_layers import compile_layers
from real_size import Example
from training import COUNTS

TOLERANCE = 5e-3  # relative difference of losses in half precision


class Bench:
    """The options, the device, and the lines measured so far."""

    def __init__(self, options: Any) -> None:
        self.tiny, self.repeats = options.tiny, options.repeats
        self.only, self.end = options.only, time.time() + 60 * options.minutes
        self.device = torch.device("cpu" if options.tiny else "cuda")
        self.file = options.lines or ROOT / "runs/bench/gpu.jsonl"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text("")
        self.lines: list[Line] = []
        self.values: dict[str, float] = {}
        self.started = time.time()

    def note(self, **values: Any) -> None:
        """Write to the file and to stderr."""
        text = json.dumps({"seconds": round(time.time() - self.started, 1), **values})
        with self.file.open("a") as file:
            file.write(text + "\n")
        sys.stderr.write(text + "\n")

    def add(self, *arguments: Any, **named: Any) -> None:
        self.lines.append(Line(*arguments, **named))
        self.note(**{k: v for k, v in self.lines[-1]._asdict().items() if v is not None})

    def section(self, name: str, function: Callable[..., None], *arguments: Any) -> None:
        """Run it unless time is over. What it raises is noted, and does not end the rest."""
        if self.only and not any(each in name for each in self.only):
            return
        if time.time() > self.end:
            self.note(section=name, skipped="no time left")
            return
        start = time.time()
        try:
            function(self, *arguments)
        except Exception as error:  # noqa: BLE001
            self.note(section=name, error=repr(error)[:500], trace=traceback.format_exc()[-1500:])
        torch.use_deterministic_algorithms(False)
        gc.collect()
        if not self.tiny:
            torch.cuda.empty_cache()
        self.note(section=name, took=round(time.time() - start, 1))

    def synchronize(self) -> None:
        if not self.tiny:
            torch.cuda.synchronize()

    def timed(self, function: Callable[[], object]) -> tuple[float, float]:
        """Median seconds, and the peak of reserved memory in GB, which holds that of graphs."""
        for _ in range(2):
            function()
        if not self.tiny:
            self.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

        def complete() -> None:
            function()
            self.synchronize()

        (seconds,) = time_alternately(complete, repeats=self.repeats, warm=True)
        return seconds, 0.0 if self.tiny else torch.cuda.max_memory_reserved() / 1e9


class StageSteps:
    """A stage with the first batches of its plan, and the ways to take a step."""

    def __init__(self, bench: Bench, stage: str, **changes: Any) -> None:
        self.bench, self.stage = bench, STAGES[stage]
        self.settings = gpu_project.load(bench.tiny, **changes)
        self.trainer = self.settings.trainer
        self.objective: Any = load_objective(self.stage, self.settings)
        self.objective.open_readers()
        prepare_parts(self.objective.model, self.stage, self.trainer.precision, False)
        self.objective.to(bench.device)
        self.reader = self.objective.readers["train"]
        self.plan = [step for step in self.reader.plan(0) if step]
        self.rows = sum(len(rows) for _, rows in self.plan[0])
        self.make_optimizer()

    def make_optimizer(self) -> None:
        cuda = self.bench.device.type == "cuda"
        groups = [
            {**group, "params": [p for p in group["params"] if p.requires_grad], "lr": 1e-9}
            for group in self.objective.parameter_groups()
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True, capturable=cuda)
        self.trained = [p for group in groups for p in group["params"]]

    def batch(self, number: int = 0, parts: int = 1) -> StepBatch:
        from panollava.data.epoch_plan import divide

        step = self.plan[number]
        loaded = [self.reader.load(part, 0, self.shape(part)) for part in divide(step, parts)]
        moved = torch.utils._pytree.tree_map_only(
            Tensor, lambda tensor: tensor.to(self.bench.device), loaded
        )
        return StepBatch(moved, self.reader.count(step), self.rows)

    def shape(self, part: Any) -> Shape:
        """Lengths as in training: a multiple of eight."""
        size = self.reader.size(part)
        return size if size.length == 1 else size._replace(length=-(-size.length // 8) * 8)

    def graphs(self, recorder: Any = None) -> StepGraphs:
        recorder = recorder or (Rerun() if self.bench.tiny else Recorder(self.bench.device))
        arguments = (self.objective, self.optimizer, self.trainer, 0, one_device, recorder)
        return StepGraphs(*arguments)

    def eager(self, batch: StepBatch) -> float:
        """As LitStage without graphs."""
        count = len(batch.parts)
        with autocast(self.bench.device, self.trainer.precision):
            terms = self.objective.terms(batch, [0] * count, one_device)
            sums = (
                each and [*torch.autograd.grad(each[0], self.trained), each[1]] for each in terms
            )
            *gradients, values = tree_sum(sums, count)
        for parameter, gradient in zip(self.trained, gradients, strict=True):
            parameter.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.trainer.clip)
        assert torch.isfinite(values[0] + norm)
        self.optimizer.step()
        for parameter in self.trained:
            parameter.grad = None
        return float(values[0])

    def usual(self) -> tuple[Callable[[], float], float]:
        """The usual way's step, and its loss."""
        step, model = self.plan[0], self.objective.model
        rows = [[self.reader.rows[index] for index in indices] for _, indices in step]
        counts = torch.tensor([len(of) for of in rows], device=self.bench.device)
        vision = self.reader.load(step, 0).vision.to(self.bench.device)
        prefix = self.objective.dialogue.text_prefix
        example = Example(vision, prefix, rows, None)  # type: ignore[arg-type]

        def loss() -> Tensor:
            with autocast(self.bench.device, self.trainer.precision):
                each = vision.repeat_interleave(counts, dim=0)
                features = each if self.objective.reads_features else model.features(each)
                return real_size.usual_loss(model, features, example)

        def take() -> float:
            value = loss()
            value.backward()
            torch.nn.utils.clip_grad_norm_(self.trained, self.trainer.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            return value.item()

        with torch.no_grad():
            return take, loss().item()

    def compile(self) -> None:
        if self.bench.tiny:  # without a compiler
            from transformers.modeling_layers import GradientCheckpointingLayer

            for layer in self.objective.model.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.compile(backend="eager", dynamic=False)
        else:
            compile_layers(self.objective.model, few_shapes=True)


def measure_steps(
    bench: Bench, stage: str, batch_size: int, kinds: str, goal: float | None
) -> None:
    """Rows (vision: panoramas) per second of each way, its peak memory, and its share of a matrix
    product's rate. `kinds`: letters of the ways to measure: usual, eager, graph, compiled."""
    steps = StageSteps(bench, stage, **{f"stage__{stage}__batch_size": batch_size})
    batch = steps.batch()
    what = f"{stage}, {len(steps.plan[0])} panoramas"
    usual_rate = usual_peak = None
    reference = steps.eager(batch)
    with FlopCounterMode(display=False, custom_mapping=COUNTS) as counter:
        steps.eager(batch)
    flops = counter.get_total_flops()
    if "u" in kinds:
        with contextlib.suppress(torch.OutOfMemoryError):
            take, loss = steps.usual()
            seconds, usual_peak = bench.timed(take)
            usual_rate = steps.rows / seconds
            bench.add(f"{what}, the usual way", "rows/s", usual_rate)
            bench.note(what=what, usual_loss=loss, our_loss=reference)
            assert abs(loss - reference) < TOLERANCE * abs(reference) or bench.tiny
            del take
    eager_peak = None
    ways = [("eager", d) for d in (True, False) if "e" in kinds]
    ways += [("graph", d) for d in (True, False) if "g" in kinds]
    ways += [("compiled and graph", True)] * ("c" in kinds)  # compiling takes long
    compiled = False
    for way, deterministic in ways:
        torch.use_deterministic_algorithms(deterministic)
        if way.startswith("compiled") and not compiled:
            steps.compile()
            compiled = True
        if way == "eager":
            run: Callable[[], object] = partial(steps.eager, batch)
        else:
            graphs = steps.graphs()
            run = partial(replay, graphs, batch)
        start = time.time()
        run()
        bench.synchronize()
        built = time.time() - start
        seconds, peak = bench.timed(run)
        if way == "eager" and deterministic:
            eager_peak = peak
        elif way != "eager":
            loss = float(graphs.values[0])
            assert abs(loss - reference) < TOLERANCE * abs(reference), (loss, reference)
            assert bench.tiny or isinstance(graphs.recorder, Recorder), "not recorded"
        name = f"{what}, {way}, {'deterministic' if deterministic else 'any kernels'}"
        rate = steps.rows / seconds
        goals = {"at_least": goal} if goal and deterministic and way != "eager" else {}
        bench.add(
            *(name, "rows/s", rate, usual_rate),
            ratio=usual_rate and rate / usual_rate,
            **goals if usual_rate else {},
        )
        share = flops / seconds / 1e12 / bench.values.get("product", 1e9)
        bench.note(
            what=name,
            seconds_per_step=seconds,
            first_step=built,
            share_of_product=share,
            peak_gb=peak,
            peak_of_eager=eager_peak and peak / eager_peak,
            usual_peak_gb=usual_peak,
        )
        run = graphs = None  # type: ignore[assignment]
        gc.collect()


def replay(graphs: StepGraphs, batch: StepBatch) -> None:
    parts = len(batch.parts)
    graphs.update(tree_sum(graphs.parts(batch, [*range(parts)]), parts))


def measure_product(bench: Bench) -> None:
    """TFLOP/s of a large product of random matrices in bf16."""
    side = 256 if bench.tiny else 8192
    square = torch.randn(side, side, device=bench.device).bfloat16()
    seconds, _ = bench.timed(lambda: [square @ square for _ in range(4)])
    bench.values["product"] = 4 * 2 * side**3 / seconds / 1e12
    bench.add("matrix product, bf16", "TFLOP/s", bench.values["product"])


def compare_bytes(bench: Bench, stage: str, parts: int, compiled: bool) -> None:
    """Eight steps run again from the buffers, and eight that are replayed: the same weights?"""
    torch.use_deterministic_algorithms(True)
    steps = StageSteps(bench, stage)
    if compiled:
        steps.compile()
    start = [p.detach().clone() for p in steps.trained]
    digests: dict[str, str] = {}
    for way in ("rerun", "replayed", "replayed again", "replayed from step 3 on"):
        with torch.no_grad():
            for p, q in zip(steps.trained, start, strict=True):
                p.copy_(q)
        steps.make_optimizer()
        for group in steps.optimizer.param_groups:
            group["lr"] = 2e-5
        graphs = steps.graphs(Rerun() if way == "rerun" else None)
        for number in range(8):
            if way.endswith("3 on") and number == 3:  # as after a restart: new programs
                graphs = steps.graphs()
            batch = steps.batch(number % len(steps.plan), parts)
            replay(graphs, batch)
        digests[way] = _digest(steps.trained)
        bench.note(stage=stage, parts=parts, compiled=compiled, way=way, sha256=digests[way])
        graphs = None  # type: ignore[assignment]
        gc.collect()
    assert _digest(start) not in digests.values()
    same = len(set(digests.values())) == 1
    what = (
        f"{stage}, {parts} parts{', compiled' * compiled}: eager, replayed, restarted, same bytes"
    )
    bench.add(what, "true", float(same), ratio=float(same), at_least=1.0)


def _digest(tensors: list[Any]) -> str:
    content = torch.cat([tensor.detach().flatten().float() for tensor in tensors]).cpu()
    return hashlib.sha256(content.numpy().tobytes()).hexdigest()[:16]


def measure_loop(bench: Bench, compiled: bool) -> None:
    """Lightning's loop with its loader, in a process of its own; the second one finds what the
    first one compiled."""
    usual = [
        line.ours
        for line in bench.lines
        if line.what.startswith("resampler, 5") and "usual" in line.what
    ]
    flags = {"trainer.cuda_graphs": True, "trainer.compile": compiled}
    for number in (1, 2) if compiled else (1,):
        result = _child(bench, Path.cwd(), "start", "resampler", **flags)
        what = f"resampler by Lightning, 16 rows{', compiled' * compiled}, start {number}"
        limit = (60, 25)[number - 1]
        bench.add(f"{what}, to the tenth step", "s", result["tenth"], limit=limit, at_most=1.0)
        rate = result["rows_per_second"]
        against = usual[0] if usual else None
        ratio = {"ratio": rate / against, "at_least": 3.5} if against else {}
        bench.add(f"{what}, rate", "rows/s", rate, against, **ratio)
        bench.add(f"{what}, between two steps", "ms", result["between_ms"], at_most=1.0)
        bench.note(what=what, **result)


def compare_killed(bench: Bench) -> None:
    """Compiled layers and graphs with deterministic kernels: two runs, and one that is killed after
    steps 3 and 5, at the same time."""
    folder = Path.cwd() / "killed"
    flags: dict[str, Any] = {"trainer.cuda_graphs": True, "trainer.compile": not bench.tiny}
    flags |= {"trainer.accelerator": "cpu" if bench.tiny else "gpu"}
    flags |= {"trainer.precision": "32-true" if bench.tiny else "bf16-mixed"}
    flags |= {"trainer.threads": 1, "trainer.deterministic": True}
    folder.mkdir()
    _child(bench, folder, "train", "prepare", **flags)
    digests: dict[str, str] = {}

    def train(name: str, *deaths: int) -> None:
        place = Path.cwd() / f"killed_{name}"
        subprocess.run(["cp", "-r", str(folder), str(place)], check=True)
        for death in (*deaths, 0):
            result = _child(bench, place, "train", str(death), **flags)
        digests[name] = result.get("sha256", "none")

    runs = [("first", ()), ("second", ()), ("killed", (3, 5))]
    threads = [threading.Thread(target=train, args=(name, *deaths)) for name, deaths in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bench.note(what="killed", **digests)
    same = len(set(digests.values())) == 1 and len(digests) == 3
    bench.add("compiled, graphs, deterministic: two runs and a killed one, same bytes", "true",
              float(same), ratio=float(same), at_least=1.0)  # fmt: skip


def _child(bench: Bench, folder: Path, *arguments: str, **flags: Any) -> dict[str, Any]:
    """The JSON that a process of `gpu_training` prints; empty if it killed itself."""
    command = [sys.executable, str(ROOT / "benchmarks/gpu_training.py"), *arguments]
    command += ["--tiny"] * bench.tiny
    command += [f"--set={key}={json.dumps(value)}" for key, value in flags.items()]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}"}
    limit = max(30.0, bench.end + 60 - time.time())
    done = subprocess.run(
        command, cwd=folder, env=environment, text=True, capture_output=True, timeout=limit
    )
    if done.returncode == -9:
        return {}
    if done.returncode:
        raise RuntimeError(f"{arguments}: {(done.stdout + done.stderr)[-1500:]}")
    # A progress bar may follow it.
    return next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))


def measure_attention(bench: Bench) -> None:
    """Forward and backward of one layer's attention, 16 panoramas, deterministic where possible:
    with our mask; split into a causal prefix and rows; FlexAttention, and its gradients' bytes."""
    panoramas, heads, width = (2, 2, 16) if bench.tiny else (16, 14, 64)
    prefix, rows, row = (32, 3, 32) if bench.tiny else (406, 3, 46)
    length = prefix + rows * row
    torch.manual_seed(0)
    dtype = torch.float32 if bench.tiny else torch.bfloat16
    q, k, v, gradient = (
        torch.randn(panoramas, heads, length, width, device=bench.device, dtype=dtype)
        for _ in range(4)
    )
    for tensor in (q, k, v):
        tensor.requires_grad_()
    segments = torch.cat([torch.zeros(prefix), torch.arange(1, rows + 1).repeat_interleave(row)])
    segments = segments.long().to(bench.device).expand(panoramas, -1).contiguous()
    mask = attention_mask(segments)

    def masked() -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, mask)

    def split() -> Tensor:
        first = functional.scaled_dot_product_attention(
            q[:, :, :prefix], k[:, :, :prefix], v[:, :, :prefix], is_causal=True
        )
        rest = functional.scaled_dot_product_attention(q[:, :, prefix:], k, v, mask[:, :, prefix:])
        return torch.cat([first, rest], dim=2)

    def both(forward: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        out = forward()
        return (out, *torch.autograd.grad(out, (q, k, v), gradient))

    torch.use_deterministic_algorithms(True)
    reference = both(masked)
    base, _ = bench.timed(lambda: both(masked))
    bench.add("attention with our mask, deterministic", "ms", 1e3 * base)
    difference = max(
        float((a - b).abs().max()) for a, b in zip(reference, both(split), strict=True)
    )
    seconds, _ = bench.timed(lambda: both(split))
    bench.add("attention split in prefix and rows, deterministic", "ms", 1e3 * seconds, 1e3 * base)
    bench.note(what="split attention", largest_difference=difference)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same = segments[b, i] == segments[b, j]
        return (i >= j) & ((segments[b, j] == 0) | same)

    blocks = create_block_mask(allowed, panoramas, None, length, length, device=bench.device)
    attend: Any = flex_attention if bench.tiny else torch.compile(flex_attention, dynamic=False)

    def flexible() -> Tensor:
        return attend(q, k, v, block_mask=blocks)

    if bench.tiny:  # a processor has no backward pass
        q, k, v = (tensor.detach() for tensor in (q, k, v))
        assert torch.allclose(flexible(), reference[0], atol=1e-4)
        return
    first = both(flexible)
    difference = max(float((a - b).abs().max()) for a, b in zip(reference, first, strict=True))
    seconds, _ = bench.timed(lambda: both(flexible))
    bench.add("FlexAttention", "ms", 1e3 * seconds, 1e3 * base)
    equal = sum(
        all(torch.equal(a, b) for a, b in zip(first, both(flexible), strict=True))
        for _ in range(100)
    )
    bench.note(what="FlexAttention", largest_difference=difference)
    bench.add("FlexAttention, backward passes of 100 with the same bytes", "", float(equal),
              ratio=equal / 100, at_least=1.0)  # fmt: skip


def measure_answers(bench: Bench) -> None:
    """In bf16 as `evaluate` computes them. With random weights, answers of both ways may differ."""
    steps = StageSteps(bench, "resampler")
    model, panoramas = steps.objective.model, 2 if bench.tiny else 16
    whole = [(panorama, [gpu_project.ROWS * panorama]) for panorama in range(panoramas)]
    features = evaluation.encode(model, steps.reader.load(whole).vision.to(bench.device))
    dialogue = evaluation.TokenDialogue(steps.objective.dialogue.tokenizer)
    texts = list(evaluation.QUERIES.values())[: evaluation.QUERIES_PER_PANORAMA]

    def ours() -> object:
        with autocast(bench.device, steps.trainer.precision):
            return evaluation.answer(model, dialogue, features, [texts] * panoramas, 30)

    def usual() -> object:  # two of the panoramas, because it is slow
        with autocast(bench.device, steps.trainer.precision):
            return evaluation.answer_one_by_one(model, dialogue, features[:2], [texts] * 2, 30)

    seconds, _ = bench.timed(ours)
    usual()
    start = time.perf_counter()
    usual()
    bench.synchronize()
    usual_seconds = (time.perf_counter() - start) * panoramas / 2
    what = f"answers, bf16, {panoramas} panoramas, {len(texts)} queries each"
    bench.add(what, "s", seconds, usual_seconds, at_least=20.0)


def sections(bench: Bench) -> Iterator[tuple[Any, ...]]:
    """The most important first."""
    yield "product", measure_product
    yield "steps resampler 16", measure_steps, "resampler", 16, "uegc", 3.5
    yield "steps finetune 8", measure_steps, "finetune", 8, "uegc", 5.0
    yield "bytes resampler", compare_bytes, "resampler", 2, False
    yield "loop graphs", measure_loop, False
    yield "attention", measure_attention
    yield "steps vision 32", measure_steps, "vision", 32, "egc", None
    yield "killed", compare_killed
    yield "bytes finetune compiled", compare_bytes, "finetune", 1, True
    yield "steps resampler 48", measure_steps, "resampler", 48, "gc", None
    yield "answers", measure_answers
    yield "loop compiled", measure_loop, True
    yield "steps resampler 144", measure_steps, "resampler", 144, "gc", None
    yield "bytes vision", compare_bytes, "vision", 2, False


def main() -> None:
    parser = options_parser(__doc__, repeats=5)
    parser.add_argument("--lines", type=Path, help="file of JSON lines; runs/bench/gpu.jsonl")
    parser.add_argument("--minutes", type=float, default=6.5, help="start nothing after them")
    parser.add_argument("--only", nargs="*", help="sections whose name contains one of these")
    parser.add_argument("--tiny", action="store_true", help="tiny towers on a processor")
    options = parser.parse_args()
    if not (options.tiny or torch.cuda.is_available()):
        sys.stderr.write(f"torch {torch.__version__} finds no GPU; nothing was measured\n")
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as Lightning sets it
    bench = Bench(options)
    device = "processor" if options.tiny else torch.cuda.get_device_name()
    bench.note(device=device, torch=torch.__version__, cuda=torch.version.cuda)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        gpu_project.make_project(bench.tiny, panoramas=520)
        bench.note(what="project made")
        for name, function, *arguments in sections(bench):
            bench.section(name, function, *arguments)
    report(bench.lines, options.out)
    sys.stderr.write(format_table(bench.lines) + "\n")


if __name__ == "__main__":
    main()
