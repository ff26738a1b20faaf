"""`kvstore demo`: a real model answers over a long shared prompt, and its KV comes back from every tier.

Three processes, each a replica (`replica`):

    A  host + disk + Redis   cold, then warm from host memory; then it ends
    B  host + disk           started anew on A's directory: warm from disk; then a conversation and a forked prompt
    C  host + Redis          no disk, never saw the prompt: warm from Redis only

Every prompt is also computed without a store, and the greedily chosen tokens are compared. This module is the script;
what it shows is `demo_report` and `demo_plot`. It imports neither torch nor transformers.
"""

from __future__ import annotations

import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from kvstore.console import console
from kvstore.demo.explain import ReuseExplanation
from kvstore.demo.models import DemoModel, resolve_model
from kvstore.demo.plot import draw_bars
from kvstore.demo.replica import Messages, ReplicaSpec
from kvstore.demo.replica_process import ReplicaProcess
from kvstore.demo.report import DemoReport, Stage, StageAnswer, Turn, make_table, sentences, write_json
from kvstore.demo.text import FIRST_QUESTION, FOLLOW_UPS, FORK_QUESTION
from kvstore.errors import ConfigError
from kvstore.extras import require
from kvstore.limits import usable_cpus
from kvstore.testing.redis_server import LocalRedis, RedisNotInstalled

PREFILL_CHUNK = 128  # 256 computes 11 % faster; hits end on its multiples, so 128 wastes less of a short prompt
NEW_TOKENS = 32
MIN_PROMPT_TOKENS = 2 * PREFILL_CHUNK  # a fork shares half, and a hit ends on a multiple of the chunk
MAX_THREADS = 16
# Kernels for bfloat16 exist behind these flags of /proc/cpuinfo; without them float32 is faster.
BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")


class DemoDtype(str, Enum):
    """The model's number format."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def demo(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Directory or hub id; 'random': random weights, no download. Default: SmolLM2-135M.",
        ),
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers here.")] = None,
    png_path: Annotated[Path, typer.Option("--png", metavar="FILE", help="Where the figure goes.")] = Path("demo.png"),
    explain: Annotated[
        bool, typer.Option("--explain", help="Also measure and tell how KV caching works in this run.")
    ] = False,
    prompt_tokens: Annotated[
        int, typer.Option(min=MIN_PROMPT_TOKENS, help="Length of the shared system prompt, about.")
    ] = 1800,
    dtype: Annotated[
        DemoDtype, typer.Option(help="auto: bfloat16 where this processor computes in it, else float32.")
    ] = DemoDtype.AUTO,
    threads: Annotated[int, typer.Option(min=0, help=f"Of torch; 0: the cores, at most {MAX_THREADS}.")] = 0,
    redis: Annotated[
        bool | None,
        typer.Option(
            "--redis/--no-redis", help="Default: with Redis if a redis-server is installed.", show_default=False
        ),
    ] = None,
    redis_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Use this server, under a prefix of this run's own, in place of a private one."
        ),
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option(help="Keep the disk tier here (new or empty), to look at it with `kvstore inspect`."),
    ] = None,
) -> int:
    """Play the whole store with a real model: cold, host, disk, Redis, a conversation, a fork.

    Ends with 1 if any stage gave other tokens than the model gives without the store.
    """
    require("demo", "the demo")
    out = console()
    show = Narrator(out)
    began = time.monotonic()
    with unwound_by_sigterm(), ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvstore-demo-")))
        disk_path = _disk_directory(directory, scratch)
        found_url, left_out = _redis_server(redis, redis_url, stack)
        with show.step("model") as step:
            chosen = resolve_model(model, step.update)
            step.note(chosen.name)
        if chosen.is_random:
            out.print(
                "[bold yellow]Random weights: the answers mean nothing; times and equality of tokens are real.[/]"
            )
        if left_out:
            out.print(f"[bold yellow]The Redis stage is left out:[/] {escape(left_out)}")
        spec = ReplicaSpec(
            source=chosen.source,
            dtype=_dtype(dtype, chosen),
            threads=threads or min(_cores(), MAX_THREADS),
            prefill_chunk=PREFILL_CHUNK,
            disk_path=str(disk_path),
            redis_url=found_url,
            redis_prefix=f"kvstore-demo-{uuid.uuid4().hex[:12]}:",
        )
        play = Play(spec, prompt_tokens, scratch, show)
        stages = play.stages()
        explanation = play.explain() if explain else None
        play.close()
    report = DemoReport(chosen.name, spec.dtype, spec.threads, tuple(stages), {"redis": left_out} if left_out else {})
    _finish(out, report, explanation, png_path, json_path)
    if directory is not None:
        out.print(f"The disk tier is in {directory}: kvstore inspect {directory}", markup=False)
    out.print(f"[dim]{time.monotonic() - began:.0f} s in all[/]")
    return 0 if report.identical else 1


@contextmanager
def unwound_by_sigterm() -> Iterator[None]:
    """Make SIGTERM (of `timeout`, CI, `docker stop`) unwind as Ctrl-C does: processes end, 2 GiB of files go; exit 143.

    Only the main thread may call this.
    """

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(slots=True)
class Step:
    """A line being written: what is under way, and what is said when it is done."""

    update: Callable[[str], None]
    text: str = ""

    def note(self, text: str) -> None:
        """Say this when the step is done."""
        self.text = text


class Narrator:
    """Shows what is under way: a spinner on a terminal, and a line per finished step everywhere."""

    def __init__(self, out: Console) -> None:
        self._out = out

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Run a step; its line is printed with the seconds it took, unless it raises."""
        began = time.monotonic()
        with self._out.status(escape(title)) as status:
            step = Step(lambda text: status.update(f"{escape(title)} [dim]{escape(text)}[/]"))
            yield step
        head = f" {title:32} {time.monotonic() - began:5.1f} s "
        line = Text.assemble(("✓", "green"), head, (step.text, "dim"))
        if self._out.is_terminal:
            self._out.print(line, no_wrap=True, overflow="ellipsis")
        else:
            self._out.print(line, soft_wrap=True)  # a log has room for all of it


class Play:
    """The stages, in order. Replica B stays open until `close`, for the conversation, the fork and `explain`."""

    def __init__(self, spec: ReplicaSpec, prompt_tokens: int, log_directory: Path, show: Narrator) -> None:
        self._spec = spec
        self._prompt_tokens = prompt_tokens
        self._logs = log_directory
        self._show = show
        self._restarted: ReplicaProcess | None = None
        self._messages: Messages = ()

    def stages(self) -> list[Stage]:
        """Play all stages; that of Redis only if there is a server. Kills what it started if one fails."""
        try:
            return self._stages()
        except BaseException:
            if self._restarted is not None:
                self._restarted.kill()
            raise

    def explain(self) -> ReuseExplanation:
        """Measure what a KV cache is worth here, on the shared prompt."""
        assert self._restarted is not None
        with self._show.step("explain"):
            return ReuseExplanation.from_record(
                self._restarted.call({"do": "explain", "messages": list(self._messages)})
            )

    def close(self) -> None:
        """End replica B."""
        if self._restarted is not None:
            self._restarted.close()

    def _stages(self) -> list[Stage]:
        with self._start("replica A", "host, disk" + (", Redis" if self._spec.redis_url else ""), self._spec) as first:
            texts = first.call({"do": "prompts", "prompt_tokens": self._prompt_tokens})
            self._messages = prompt = _prompt(texts["handbook"], FIRST_QUESTION)
            reference = self._ask(first, "reference, no store", prompt, use_store=False)
            cold = self._ask(first, "cold", prompt)
            with self._show.step("writing behind"):
                first.flush()
            host = self._ask(first, "host", prompt)
        stages = [
            Stage(name, (Turn(answer, reference, cold.ttft_s),)) for name, answer in (("cold", cold), ("host", host))
        ]

        self._restarted = self._start("replica B", "new process, same disk", replace(self._spec, redis_url=None))
        disk = self._ask(self._restarted, "disk", prompt)
        stages.append(Stage("disk", (Turn(disk, reference, cold.ttft_s),)))

        if self._spec.redis_url is not None:
            with self._start("replica C", "no disk, Redis only", replace(self._spec, disk_path=None)) as other:
                found = self._ask(other, "redis", prompt)
            stages.append(Stage("redis", (Turn(found, reference, cold.ttft_s),)))

        stages.append(self._conversation(self._restarted, [*prompt], host.text))
        stages.append(Stage("fork", (self._turn(self._restarted, "fork", _prompt(texts["forked"], FORK_QUESTION)),)))
        return stages

    def _conversation(self, replica: ReplicaProcess, messages: list[dict[str, str]], answer: str) -> Stage:
        turns = []
        for number, question in enumerate(FOLLOW_UPS, start=2):
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
            turn = self._turn(replica, f"conversation, turn {number}", messages)
            turns.append(turn)
            answer = turn.answer.text
        return Stage("conversation", tuple(turns))

    def _turn(self, replica: ReplicaProcess, title: str, messages: Messages) -> Turn:
        answer = self._ask(replica, title, messages)
        reference = self._ask(replica, f"{title}, no store", messages, use_store=False)
        return Turn(answer, reference, reference.ttft_s)

    def _start(self, name: str, what: str, spec: ReplicaSpec) -> ReplicaProcess:
        with self._show.step(f"{name} starts") as step:
            step.note(what)
            return ReplicaProcess(name.replace(" ", "-"), spec, self._logs)

    def _ask(self, replica: ReplicaProcess, title: str, messages: Messages, *, use_store: bool = True) -> StageAnswer:
        said = ""
        with self._show.step(title) as step:

            def hear(text: str) -> None:
                nonlocal said
                said += text
                step.update(_one_line(said))

            step.update("waiting for the first token")
            answer = replica.ask(messages, max_new_tokens=NEW_TOKENS, use_store=use_store, on_text=hear)
            reused = f", {answer.reused_tokens:,} reused" if use_store else ""
            step.note(f"TTFT {answer.ttft_s:.2f} s, {answer.prompt_tokens:,} tokens{reused}: {_one_line(answer.text)}")
        return answer


def _one_line(text: str) -> str:
    """The model's text without the control characters that random weights produce too."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def _prompt(system: str, question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def _redis_server(wanted: bool | None, url: str | None, stack: ExitStack) -> tuple[str | None, str]:
    """The URL of the server to use, which is a private one unless `url` names another; or None with the reason."""
    if wanted is False:
        return None, "--no-redis was given"
    if url is not None:
        return url, ""
    try:
        return stack.enter_context(LocalRedis()).url, ""
    except RedisNotInstalled as error:
        if wanted:
            raise
        return None, str(error)


def _disk_directory(directory: Path | None, scratch: Path) -> Path:
    if directory is None:
        return scratch / "disk"
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"directory: {directory} must be new or empty, or the first stage would not be cold")
    return directory.resolve()


def _dtype(wanted: DemoDtype, model: DemoModel) -> str:
    if wanted is not DemoDtype.AUTO:
        return str(wanted.value)
    # Random weights make flat distributions, in which a rounded number changes the choice.
    best = DemoDtype.FLOAT32 if model.is_random or not _has_bfloat16() else DemoDtype.BFLOAT16
    return str(best.value)


def _has_bfloat16() -> bool:
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return False
    return any(flag in words for flag in BFLOAT16_FLAGS)


def _cores() -> int:
    return usable_cpus()


def _finish(
    out: Console, report: DemoReport, explanation: ReuseExplanation | None, png_path: Path, json_path: Path | None
) -> None:
    out.print()
    out.print(make_table(report))
    out.print(f"[dim]{report.dtype}, {report.threads} CPU threads, greedy, equal prefill chunks in every stage.[/]")
    out.print("[dim]Conversation and fork are compared with the same prompt computed without the store.[/]\n")
    for sentence in sentences(report):
        out.print(sentence, markup=False)
    if explanation is not None:
        out.print()
        out.print(explanation.panel())
    draw_bars(report, png_path)
    out.print(f"\nfigure: {png_path}", markup=False)
    if json_path is not None:
        write_json(report, json_path, explanation.to_record() if explanation is not None else None)
        out.print(f"numbers: {json_path}", markup=False)
