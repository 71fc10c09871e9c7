"""Train a language model on text and show that it learned.

    python -m hope_jax pretrain --run runs/hope-tiny
    python -m hope_jax pretrain --run runs/mine --model hope-tiny --data.path books/*.txt --steps 2000

The first command needs no data: its text is the Python standard library of the running interpreter. It measures
held-out bits per byte before, during and after training, and writes into the run folder ``metrics.jsonl``, TensorBoard
events, ``loss.png``, ``sample.txt`` and ``checkpoints/``. Ctrl-C saves and prints the command that goes on; so does
SIGTERM. A resumed run gives bit for bit what an uninterrupted one gives; on another number of devices, up to rounding.

Exit status: 0 finished, 2 a mistake or a diverged run, 130 after Ctrl-C, 143 after SIGTERM: whoever restarts jobs on a
status other than 0 continues a preempted run and leaves a finished one alone.
"""

import dataclasses
import functools
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from hope_jax import LanguageModel, generate, model_named
from hope_jax import train as training
from hope_jax.cli.checks import flag, must_divide
from hope_jax.cli.in_context import InContextConfig
from hope_jax.cli.parse import parse
from hope_jax.cli.running import keep_programs, without
from hope_jax.cli.runs import keep_tokenizer
from hope_jax.data import DataConfig, make_tokenizer, open_text
from hope_jax.errors import UserError
from hope_jax.train.optimizer import OptimizerConfig
from hope_jax.train.run_folder import flatten, open_run


@dataclass(frozen=True)
class PretrainConfig:
    """Train a language model on text, measure it on held-out text, and write a sample."""

    run: Path
    """Folder of the run: checkpoints, metrics, curve and sample. The same folder and flags continue a run."""
    model: str = "hope-tiny"
    """Name of the model, <architecture>-<size>."""
    steps: int = 400
    """Batches to train on in all. May be raised later; the learning rate then follows the longer schedule."""
    batch: int = 4
    """Sequences per batch."""
    length: int = 512
    """Tokens per sequence."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What matrix products and activations are computed in; parameters and the loss stay float32."""
    accumulate: int = 1
    """Slices of a batch computed one after another to save memory; must divide the batch."""
    segment: int | None = None
    """Tokens of one piece in rematerialised training; must divide the length. None: the whole sequence at once."""
    seed: int = 0
    """Of the initial parameters, the order of the text and the sample."""
    eval_every: int = 100
    """Batches between measurements on held-out text; it is also measured before and after training."""
    eval_batches: int = 16
    """Batches of held-out text per measurement, always the same ones."""
    save_every: int = 100
    """Batches between checkpoints; the last one is always saved."""
    keep: int = 3
    """Checkpoints to keep, at least 2, so that a damaged one has a good one before it."""
    resume_from: int | None = None
    """Go back to this saved step; later ones are moved to set_aside/. None: go on from the latest."""
    sample_tokens: int = 256
    """Tokens to write after training, continuing held-out text."""
    devices: int | None = None
    """Devices that share each batch; on a CPU, cores. None: all that there are, as far as they divide the batch."""
    compile_cache: bool = True
    """Keep compiled programs beside the run folder, so that the next start is quick."""
    cms: InContextConfig = field(default_factory=InContextConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self):
        self.cms.apply(model_named(self.model))
        least = dict.fromkeys(("steps", "batch", "length", "accumulate", "eval_every", "eval_batches", "save_every"), 1)
        for name, bound in (least | {"keep": 2, "seed": 0, "sample_tokens": 0}).items():
            if getattr(self, name) < bound:
                raise UserError(f"{flag(name)} must be at least {bound}, got {getattr(self, name)}.")
        must_divide("accumulate", self.accumulate, "batch", self.batch)
        if self.segment is not None:
            must_divide("segment", self.segment, "length", self.length)
        if self.devices is not None:
            must_divide("devices", self.devices, "batch / --accumulate", self.batch // self.accumulate)
        self.cms.check(self.length, self.segment)


class Outcome(NamedTuple):
    """How a call of ``pretrain`` ended. ``before``, ``after``: held-out bits per byte, None if not measured."""

    step: int
    finished: bool
    before: float | None
    after: float | None
    files: list[Path]


def main(arguments: Sequence[str]) -> int:
    """The command line: train until done or asked to stop; returns the exit status."""
    config, stop = parse(PretrainConfig, arguments, "python -m hope_jax pretrain"), training.Interrupt()
    outcome = pretrain(config, stop)
    if outcome.finished:
        return 0
    again = shlex.join([sys.executable, "-m", "hope_jax", "pretrain", *without(arguments, "--resume-from")])
    print(f"Stopped at step {outcome.step} of {config.steps}; nothing is lost. To go on:\n  {again}")
    return 128 + (stop.signal or 0)


class Job(NamedTuple):
    """Everything a run is made of before its first step."""

    config: PretrainConfig
    model: Any
    tokenizer: Any
    data: Any
    tx: optax.GradientTransformation
    rate: Any
    identity: dict[str, Any]
    mesh: Mesh

    @property
    def tokens_per_step(self) -> int:
        """Targets of one batch."""
        return self.config.batch * self.config.length


def pretrain(config: PretrainConfig, stop: Any) -> Outcome:
    """Run ``config`` from its last saved step; ``stop`` is entered while training and may end it early, all saved.

    Raises:
        UserError: anything the caller can mend, most of it before the first step.
    """
    training.split_host(config.devices)
    with open_run(config.run) as folder:
        if config.compile_cache:
            keep_programs(folder.absolute().parent / ".cache")
        job = _prepare(config)
        like = training.abstract_state(job.model, job.tx)
        training.check_room(folder, like, config.keep)
        batches = job.data.train_batches(batch=config.batch, seed=config.seed)
        state = _resume(job, like, batches)
        keep_tokenizer(folder, config.data)
        print(_header(job, like))
        state, heldout = _train(job, state, batches, stop)
        return _finish(job, state, heldout)


def _prepare(config: PretrainConfig) -> Job:
    tokenizer = make_tokenizer(config.data)
    cache = config.run.absolute().parent / ".cache" / "data"
    data = open_text(config.data, tokenizer, length=config.length, cache_dir=cache, progress=True)
    architecture = dataclasses.replace(
        config.cms.apply(model_named(config.model)), vocab_size=tokenizer.vocab_size, dtype=jnp.dtype(config.dtype)
    )
    model = LanguageModel(architecture)
    every = architecture.update_every(config.batch * config.length)
    return Job(
        config=config,
        model=model,
        tokenizer=tokenizer,
        data=data,
        tx=training.optimizer(config.optimizer, config.steps, every),
        rate=training.schedule(config.optimizer, config.steps),
        identity=_identity(config, architecture, data.fingerprint),
        mesh=training.data_mesh(config.batch // config.accumulate, config.devices),
    )


def _identity(config: PretrainConfig, architecture: Any, fingerprint: str) -> dict[str, Any]:
    """What a run folder belongs to: all that decides what is learned, up to rounding, but for the number of steps.

    The text counts by its content (the fingerprint), not by the path it is found under. A tied head and levels
    that learn nothing in context go without saying: folders from before there was a choice do not name them.
    """
    named = {name: getattr(config, name) for name in ("model", "batch", "length", "dtype", "seed", "optimizer")}
    sizes = flatten(architecture, "model")
    if architecture.tied:
        del sizes["model.tied"]
    return flatten(named, "") | config.cms.identity(sizes) | {"text fingerprint": fingerprint}


def _resume(job: Job, like: Any, batches: Any) -> Any:
    """The state to go on from, with ``batches`` moved to its place: a saved step's, or a fresh one."""
    config, folder = job.config, job.config.run
    step = training.step_to_resume(folder, config.resume_from, config.steps)
    if step is None:
        init = jax.jit(functools.partial(training.init_state, job.model, job.tx))
        state = init(jax.random.key(config.seed))
    else:
        state, manifest = training.resume(folder, step, like, job.identity)
        batches.set_state(manifest.data)
        print(_continuation(job, step, manifest.config))
    state = training.replicate(job.mesh, state)
    for place in training.set_aside(folder, step or 0):
        print(f"Moved what does not lead to step {step or 0} to {place}.")
    return state


def _continuation(job: Job, step: int, saved: dict[str, Any]) -> str:
    """One line on where the run goes on, and what a changed number of devices or steps does to it."""
    planned, devices = saved["steps"], saved.get("devices", 1)  # runs of earlier versions used one
    line = f"Continuing {job.config.run} from step {step} of {job.config.steps}."
    if devices != job.mesh.size:
        line += f" It was saved on {devices} and goes on on {job.mesh.size} devices: the same up to rounding."
    if step == job.config.steps:
        return f"The run in {job.config.run} has finished its {step} steps; raise --steps to train on."
    if planned == job.config.steps:
        return line
    before = float(training.schedule(job.config.optimizer, planned)(step))
    return (
        f"{line} It was planned for {planned} steps: the cosine now ends at {job.config.steps}, and the learning rate "
        f"goes on at {float(job.rate(step)):.2e} instead of {before:.2e}."
    )


def _header(job: Job, like: Any) -> str:
    device, length = jax.devices()[0], job.config.length
    rows = {
        "model": f"{job.config.model}, {training.count_parameters(like.params):,} parameters, {job.config.dtype}",
        "text": f"{len(job.data.train) * length:,} tokens to train on, {len(job.data.heldout) * length:,} held out",
        "batch": f"{job.config.batch} x {length} = {job.tokens_per_step:,} tokens per step, {job.config.steps:,} steps",
        "device": f"{device.device_kind}, {job.mesh.size} of {jax.device_count()}",
        "run": str(job.config.run),
    }
    return "\n".join(f"{name:<8}{value}" for name, value in rows.items())


def _train(job: Job, state: Any, batches: Any, stop: Any) -> tuple[Any, dict[int, float]]:
    """The state after training and the held-out bits per byte by step."""
    config, done = job.config, int(state.step)
    loss = training.next_token_loss(job.model, job.tokenizer.byte_lengths, config.segment)
    place = functools.partial(training.share, job.mesh)
    step = training.train_step(loss, job.tx, job.rate, config.accumulate)
    heldout = [place(batch) for batch in job.data.heldout_batches(batch=config.batch, limit=config.eval_batches)]
    saved = {training.IDENTITY: job.identity, "steps": config.steps}
    saved |= {"tokenizer": job.tokenizer.fingerprint, "devices": job.mesh.size}
    with (
        training.Record(config.run, done) as record,
        training.Monitor(record, done, config.steps, job.tokens_per_step) as monitor,
        training.Saver(config.run, saved, config.keep) as saver,
        stop,
    ):
        state = training.train(
            training.Plan(config.steps, config.eval_every, config.save_every),
            state,
            batches,
            step_fn=lambda state, batch: step(state, place(batch)),
            evaluate=training.evaluator(loss, heldout),
            saver=saver,
            monitor=monitor,
            stop=stop,
        )
        return state, record.heldout


def _finish(job: Job, state: Any, heldout: dict[int, float]) -> Outcome:
    """Curve and sample of a finished run; for an unfinished one only where it stands."""
    config, step = job.config, int(state.step)
    before, after = heldout.get(0), heldout.get(step)
    if step < config.steps:
        return Outcome(step, False, before, after, [])
    files = [config.run / "metrics.jsonl", training.draw_curve(config.run, config.model)]
    if config.sample_tokens:
        files.append(_write_sample(job, jax.device_put(state.params, jax.devices()[0])))
    first, last = ("not measured" if value is None else f"{value:.3f}" for value in (before, after))
    print(f"held-out bits per byte: {first} before -> {last} after {step} steps")
    print("written: " + ", ".join(map(str, [*files, config.run / "tensorboard", config.run / "checkpoints"])))
    return Outcome(step, True, before, after, files)


def _write_sample(job: Job, params: Any) -> Path:
    """A continuation of the first held-out text, printed and written to ``sample.txt``."""
    config = job.config
    window = next(iter(job.data.heldout_batches(batch=1, limit=1)))
    prompt = np.asarray(window)[:, : max(1, min(128, config.length // 2))]
    state = job.model.init_state(params, batch=1, capacity=prompt.shape[1] + config.sample_tokens)
    how: dict[str, Any] = {"steps": config.sample_tokens, "temperature": 0.8, "key": jax.random.key(config.seed)}
    tokens, _ = generate.sample(job.model, params, state, jnp.asarray(prompt), **how)
    text = f"{job.tokenizer.decode(prompt[0])}[the model goes on]{job.tokenizer.decode(np.asarray(tokens)[0])}\n"
    path = config.run / "sample.txt"
    path.write_text(text, encoding="utf-8")
    print(f"sample:\n{text}")
    return path
