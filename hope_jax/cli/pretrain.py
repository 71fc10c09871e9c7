"""Train a language model on text and show that it learned.

    python -m hope_jax pretrain --run runs/hope-tiny
    python -m hope_jax pretrain --run runs/mine --model hope-tiny --data.path books/*.txt --steps 2000
    python -m hope_jax pretrain --run runs/finer --stage-two runs/tnt --local-period 4 --steps 20
    python -m hope_jax pretrain --run runs/30m --model hope-30m --dry-run
    python -m hope_jax pretrain --run runs/760m --config experiments/published/hope-760m.toml --data.path texts

The first command needs no data: its text is the Python standard library of the running interpreter. It measures
held-out bits per byte before, during and after training, and writes into the run folder ``metrics.jsonl``, TensorBoard
events, ``loss.png``, ``sample.txt`` and ``checkpoints/``. Ctrl-C saves and prints the command that goes on; so do
SIGTERM, SIGHUP and a terminal or pipe that is closed. A resumed run gives bit for bit what an uninterrupted run gives;
on another number of devices, sums are rounded differently.

Exit status: see ``main.py``; 0 is finished. A program that restarts jobs whose status is not 0 continues a preempted
run and leaves a finished one alone.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import tyro

from hope_jax import LanguageModel, model_named
from hope_jax import train as training
from hope_jax.cli.checks import at_least
from hope_jax.cli.dry_run import costs
from hope_jax.cli.in_context import InContextConfig, check_reading
from hope_jax.cli.main import say, silence
from hope_jax.cli.parse import parse, with_file
from hope_jax.cli.report import continued, draw
from hope_jax.cli.stages import Stage, begin, check_stage
from hope_jax.cli.step_flags import StepFlags
from hope_jax.data import DataConfig, TextData, Tokenizer, make_tokenizer, open_text
from hope_jax.errors import check_seed
from hope_jax.models import with_impl
from hope_jax.train.guard import check_spike
from hope_jax.train.kernels import evaluated
from hope_jax.train.processes import in_turn
from hope_jax.train.profile import profiled_steps
from hope_jax.train.run import keep_tokenizer


@dataclass(frozen=True)
class PretrainConfig(StepFlags):
    """Train a language model on text, measure it on held-out text, and write a sample."""

    run: Path  # Folder of the run: checkpoints, metrics, curve and sample. The same folder and flags continue a run.
    config: Path | None = None
    """TOML file of flags, such as experiments/published/hope-760m.toml; flags that are given replace those in it."""
    steps: int = 400  # Batches in all. May be raised later; the learning rate then follows the longer schedule.
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of products and activations; parameters and loss stay float32. None: float32; with --stage-two, that of
    the run before."""
    seed: int = 0  # Seed of the initial parameters, the order of the text and the sample.
    eval_every: int = 100  # Batches between measurements on held-out text; also measured before and after training.
    eval_batches: int = 16  # Batches of held-out text per measurement, always the same ones.
    save_every: int = 100  # Batches between checkpoints; the last one is always saved.
    save_minutes: float | None = None  # Save at least once in so many minutes, too. None: by --save-every alone.
    keep: int = 3  # Checkpoints to keep, at least 2, so that a damaged one has a good one before it.
    keep_every: int | None = None  # Checkpoints at multiples of this step are kept for ever. None: --keep alone.
    resume_from: int | None = None
    """Go back to this saved step; later ones are moved to set_aside/. None: go on from the latest good one."""
    schedule: Annotated[training.Schedule, tyro.conf.arg(name="")] = field(
        default=training.TextRun.schedule, metadata={"rows": training.SCHEDULES}
    )
    """Shape of the learning rate after the warmup, a row of ``train.SCHEDULES``."""
    z_loss: float = training.TextRun.z_loss
    """Weight of the mean of log(Z)^2 in what is minimised, Z the normaliser of the softmax; 0: none, 1e-4 is usual."""
    spike: float | None = training.TextRun.spike
    """Skip steps whose gradient norm is more than so many times the usual one, too; above 1. None: skip only steps that
    are not finite."""
    most_skipped: int = training.Steps.most_skipped  # Steps in a row that may be skipped; one more stops the run.
    sample_tokens: int = 256  # Tokens to write after training, continuing held-out text.
    processes: training.ProcessesConfig = training.ProcessesConfig()
    profile: str | None = None
    """START:STOP: record with JAX's profiler what devices and host do from step START to step STOP, into profile/."""
    dry_run: bool = False  # Print what would run, its FLOPs and bytes, and train nothing; the step is compiled.
    compile_cache: bool = True  # Keep compiled programs beside the run folder, so that the next start is quick.
    stage_two: Path | None = None  # Folder of a run of a TNT model, to go on with local memories of another period.
    local_period: int | None = None  # With --stage-two: their anchor period in tokens; must divide a shard.
    cms: InContextConfig = field(default_factory=InContextConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self):
        model = with_impl(self.cms.apply(model_named(self.model)), self.impl)
        others = (self.model, self.cms) != (PretrainConfig.model, InContextConfig())
        check_stage(self.run, self.stage_two, self.local_period, others)
        if self.stage_two is None:
            training.check_shares(self.mesh, model)
        at_least(self, 1, "steps", "eval_every", "eval_batches", "save_every")
        at_least(self, 2, "keep")
        at_least(self, 0, "sample_tokens", "most_skipped", "z_loss")
        check_spike(self.spike)
        check_seed(self.seed)
        self.check(model, self.z_loss)
        self.keeping(None)

    def keeping(self, config: Any) -> training.Run:
        """Where and how a run of that configuration is kept. Raises UserError where the flags contradict each other."""
        profile = None if self.profile is None else profiled_steps(self.profile, self.steps)
        how = {name: getattr(self, name) for name in ("keep", "keep_every", "save_minutes", "resume_from")}
        return training.Run(self.run, config, profile=profile, **how)


def main(arguments: Sequence[str]) -> int:
    """The command line: train until done or asked to stop; returns the exit status."""
    flags = parse(PretrainConfig, with_file(arguments, "--config"), "python -m hope_jax pretrain")
    training.split_host(flags.mesh.of_host, flags.processes.expected)
    with flags.processes.together():
        if not training.is_first():
            silence(sys.stdout)
        (dry_run if flags.dry_run else pretrain)(flags)
    return 0


class Job(NamedTuple):
    """What a run is made of before its first step."""

    flags: PretrainConfig
    config: training.TextRun
    tokenizer: Tokenizer
    text: TextData
    setup: training.Setup
    learned: Any  # parameters to begin with, of the run before this one; None: initial or saved ones


def pretrain(flags: PretrainConfig) -> training.Result:
    """Run ``flags`` from its last saved step to the end.

    Raises:
        Stopped: somebody asked to stop; all is saved.
        UserError: anything the caller can mend, most of it before the first step.
    """
    with training.open_run(flags.run, "--run") as folder:
        job = _prepare(flags)
        if training.is_first():
            keep_tokenizer(folder, flags.data.tokenizer)
        print(_table(_header(job)))
        result = training.fit(
            job.setup,
            job.text.train_batches(batch=flags.batch, seed=flags.seed),
            job.text.heldout_batches(batch=flags.batch, limit=flags.eval_batches),
            training.Steps(flags.steps, flags.eval_every, flags.save_every, flags.most_skipped),
            seed=flags.seed,
            start=None if job.learned is None else job.setup.start(flags.seed, job.learned),
            run=flags.keeping(job.config),
        )
        if training.is_first():
            _report(job, result)
    return result


def dry_run(flags: PretrainConfig) -> None:
    """Print what ``pretrain`` would run and what it needs; the text is prepared and the step compiled."""
    job = _prepare(flags)
    print(_table(_header(job)), flush=True)
    print(_table(costs(job.setup, flags.batch, flags.length, flags.steps)))
    print("Nothing was trained: leave out --dry-run to train.")


def _prepare(flags: PretrainConfig) -> Job:
    if flags.compile_cache:
        training.keep_programs(flags.run.absolute().parent / ".cache")
    tokenizer = make_tokenizer(flags.data)
    if flags.stage_two is None or flags.local_period is None:
        stage = Stage(flags.cms.apply(model_named(flags.model)))
    else:
        stage = begin(flags.run, flags.stage_two, flags.local_period, tokenizer)
        check_reading(stage.model, flags.length, flags.remat_every, flags.z_loss)
    cache = flags.run.absolute().parent / ".cache" / "data"
    with in_turn():
        text = open_text(flags.data, tokenizer, length=flags.length, cache_dir=cache, progress=training.is_first())
    dtype = jnp.dtype(flags.dtype or stage.model.dtype)
    config = training.TextRun(
        model=dataclasses.replace(stage.model, vocab_size=tokenizer.vocab_size, dtype=dtype),
        optimizer=flags.optimizer.at_width(stage.model.width),
        batch=flags.batch,
        length=flags.length,
        seed=flags.seed,
        text_fingerprint=text.fingerprint,  # of its content, not of the path that it is found under
        tokenizer_fingerprint=tokenizer.fingerprint,
        stage_one=stage.origin,
        schedule=flags.schedule,
        z_loss=flags.z_loss,
        spike=flags.spike,
    )
    mesh = flags.mesh.make(flags.batch // flags.accumulate)
    setup = flags.setup(config, flags.steps, tokenizer.byte_lengths, mesh)
    return Job(flags, config, tokenizer, text, setup, stage.params)


def _table(rows: dict[str, str]) -> str:
    return "\n".join(f"{name:<8}{value}" for name, value in rows.items())


def _header(job: Job) -> dict[str, str]:
    device, flags, tokens = jax.devices()[0], job.flags, job.setup.tokens
    parameters = training.count_parameters(job.setup.shapes().params)
    read, heldout = (len(part) * flags.length for part in (job.text.train, job.text.heldout))
    return {
        "model": f"{flags.stage_two or flags.model}, {parameters:,} parameters, {job.config.model.dtype}",
        "text": f"{read:,} tokens to train on, {heldout:,} held out",
        "batch": f"{flags.batch} x {flags.length} = {tokens:,} tokens per step, {flags.steps:,} steps",
        "memory": evaluated(with_impl(job.config.model, flags.impl), device.platform),
        "kept": training.what_is_kept(job.config.model, flags.remat, flags.remat_every, device.platform),
        "device": f"{device.device_kind}, {job.setup.devices} of {jax.device_count()}",
        "run": str(flags.run),
    }


def _report(job: Job, result: training.Result) -> None:
    """Curve and sample of a finished run, written down and printed."""
    run, bits = job.flags.run, {step: means["bits_per_byte"] for step, means in result.heldout.items()}
    files = [run / "metrics.jsonl", draw(run, str(job.flags.stage_two or job.flags.model))]
    if job.flags.sample_tokens:
        whole = job.flags.mesh.fsdp * job.flags.mesh.tensor == 1  # else one device may be too small for all parameters
        how = (job.flags.length // 2, job.flags.sample_tokens, job.flags.seed, whole)
        sample = continued(LanguageModel(job.config.model), result.params, job.tokenizer, job.text, *how)
        files.append(run / "sample.txt")
        files[-1].write_text(sample, encoding="utf-8", errors="replace")
        say(f"sample:\n{sample}")
    first, last = (f"{bits[step]:.3f}" if step in bits else "not measured" for step in (0, result.step))
    say(f"held-out bits per byte: {first} before -> {last} after {result.step} steps")
    say("written: " + ", ".join(map(str, [*files, run / "tensorboard", run / "checkpoints"])))
