"""What a model has learned as one portable file, apart from its weights; ``docs/context_file.md`` has the layout."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hope_jax.config import flatten
from hope_jax.context.schedule import schedule_of
from hope_jax.context.stream import State, batch_of, check_kinds, entered, start
from hope_jax.errors import UserError
from hope_jax.nn.feed_forward.fast import ContextState
from hope_jax.nn.room import slots_of, without_empty_slots
from hope_jax.storage.digests import digest_arrays, first_difference, kind, leaves
from hope_jax.storage.tensor_file import Foreign, NotWhole, read_about, read_tensors, write_tensors

VERSION = 1
"""Of the layout; a file of another version is refused."""


def save(path: str | Path, model: Any, params: Any, state: State, note: Any = None) -> None:
    """Write everything that the stream needs to go on as file ``path``, which replaces an older one.

    The file is small: tensors of zeros, empty slots of caches, and what is there twice are left out.

    Args:
      path: any name; ``.safetensors`` is usual. Its folder is made.
      note: JSON of your own that is kept with it, see ``note``.

    Raises:
      UserError: ``path`` is something else, it cannot be written, or the state is of another model.
    """
    path, batch, state = Path(path), batch_of(state), entered(model, state)
    check_kinds(state, start.eval_shape(model, params, batch, slots_of(state)))
    check_place(path)
    stored = jax.tree.map(np.asarray, without_empty_slots(state))
    tensors, same = _distinct(dict(leaves(stored)))
    about = {
        "version": VERSION,
        "model": _identity(model, params),
        "batch": batch,
        "capacity": slots_of(state),
        "levels": [{"periods": list(layers)} for layers in schedule_of(model, trained=False).periods],
        "position": int(state.position),
        "unfinished": int(state.unfinished),
        "same": same,
        "note": note,
    }
    try:
        write_tensors(path, tensors, about)
    except (OSError, NotWhole) as error:
        raise UserError(f"{path} could not be written ({error}); what was saved there before is untouched") from error


def load(path: str | Path, model: Any, params: Any) -> ContextState:
    """The saved state, bit for bit: going on from it equals never having stopped.

    It belongs to the model and the parameters that it was made with; inner rates and ``bptt`` may be others.

    Raises:
      UserError: nothing is saved there, it is damaged, or it belongs to another model or other parameters.
    """
    path = Path(path)
    tensors, about = _read(path, read_tensors)
    if different := first_difference(about["model"], _identity(model, params)):
        name, there, here = different
        raise UserError(f"the context in {path} is of another model: {name} is {there} there and {here} here")
    expected = start.eval_shape(model, params, about["batch"], about["capacity"])
    tensors |= {name: tensors[other] for name, other in about["same"].items()}
    filled = [_filled(path, name, tensors.pop(name, None), leaf) for name, leaf in leaves(expected)]
    if tensors:
        raise UserError(f"the context in {path} is damaged: {min(tensors)} is nothing that such a model has")
    return jax.tree.unflatten(jax.tree.structure(expected), filled)


def note(path: str | Path) -> Any:
    """The ``note`` that was saved with a state. Raises UserError where nothing is saved or it is damaged."""
    return _read(Path(path), lambda path: (None, read_about(path)))[1]["note"]


def check_place(path: Path) -> None:
    """Raise UserError where ``save`` could not write: better known before reading than after."""
    trial = path.absolute().with_name(f".{path.name}.trial")
    try:
        if path.exists():
            read_about(path)
        trial.parent.mkdir(parents=True, exist_ok=True)
        trial.write_bytes(b"\0" * 4096)
        trial.unlink()
    except Foreign as error:
        raise UserError(f"{path} is there and is no saved context; choose another place") from error
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}); choose another place") from error
    except NotWhole:
        pass  # a damaged one is replaced


def _read(path: Path, how: Any) -> Any:
    """What ``how`` reads of a file of this version."""
    try:
        tensors, about = how(path)
    except OSError as error:
        raise UserError(f"there is no saved context in {path} ({error.strerror or error})") from error
    except Foreign as error:
        raise UserError(f"there is no saved context in {path}: {error}") from error
    except NotWhole as error:
        raise UserError(f"the context in {path} is damaged: {error}") from error
    if (version := about["version"]) != VERSION:
        raise UserError(f"the context in {path} has layout {version}; this version of hope_jax reads {VERSION}")
    return tensors, about


def _distinct(tensors: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors that are not zero, each once; and for the others of these, the name that theirs is stored by."""
    names: dict[tuple[str, bytes], str] = {}
    same = {}
    for name, tensor in tensors.items():
        content = kind(tensor), tensor.tobytes()
        if content[1].strip(b"\0") and (first := names.setdefault(content, name)) != name:
            same[name] = first
    return {name: tensors[name] for name in names.values()}, same


def _filled(path: Path, name: str, tensor: np.ndarray | None, like: jax.ShapeDtypeStruct) -> jax.Array:
    """The tensor in the shape that it has in a state; the rest of it, or all where there is none, is zeros."""
    whole = np.zeros(like.shape, like.dtype)
    if tensor is not None:
        same = tensor.dtype == like.dtype and tensor.ndim == like.ndim
        if not (same and np.all(tensor.shape <= np.array(like.shape))):
            raise UserError(f"the context in {path} is damaged: {name} is {kind(tensor)}; expected {kind(like)}")
        whole[tuple(map(slice, tensor.shape))] = tensor
    return jnp.asarray(whole)


def _identity(model: Any, params: Any) -> dict[str, Any]:
    """What a saved state belongs to: Delta means nothing beside other weights. The rate of its writes may change."""
    free = ("feed_forward.writes.rate", "feed_forward.writes.bptt")
    sizes = {name: value for name, value in flatten(model.config).items() if not name.startswith(free)}
    part = {name: leaf for name, leaf in params["blocks"]["feed_forward"].items() if name != "rate"}
    weights = params | {"blocks": params["blocks"] | {"feed_forward": part}}
    return sizes | {"parameters": f"those of digest {digest_arrays(weights)[:16]}"}
