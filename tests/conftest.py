"""Settings of every test: CPU only, no silent broadcasting between ranks, programs that compile quickly and are kept.

``x64`` gives a test float64, ``key`` a fixed random key. Shapes in signatures are checked (see ``setup.cfg``).
"""

import gc
import os
import signal
from pathlib import Path

import type_checks  # noqa: F401, before the package is imported
from compiling import FLAGS

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = FLAGS + " " + os.environ.get("XLA_FLAGS", "")

import jax
import pytest
import tokenizers
from corpora import LETTERS, TEXT
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import config as type_checker
from made_once import once
from tqdm import tqdm
from trained_run import document, learned, learned_once, short_pieces, trained, trained_once  # noqa: F401, fixtures

from hope_jax.storage import programs

# Files in which programs are stored traced, as users do.
STORING = ("test_programs", "test_learn")
MEMORY_MAPS = Path("/proc/self/maps")
# Files that take longest, longest first: two workers then end together. The rest follow in the order of their names.
LONGEST = ("test_self_modifying", "test_models", "test_learn", "test_writes", "test_tnt", "test_context", "test_cli")
LONGEST += ("test_train", "test_titans", "test_miras", "test_ttt", "test_runs", "test_writes_linear")
LONGEST += ("test_sharded_steps", "test_sharding", "test_processes", "test_gpu_check")  # with their slow tests


def pytest_configure(config):
    """JAX settings of the whole run."""
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)  # what is quicker is not worth a file
    tqdm.monitor_interval = 0  # its thread wakes by the clock, and a warning in it fails whatever test is running
    gc.set_threshold(100_000, 20, 100)  # tracing makes many objects and little garbage
    config.option.loadscopereorder = False  # pytest-xdist hands out files as they are listed, see below


def pytest_collection_modifyitems(items):
    """Long files first."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.fixture(autouse=True, scope="module")
def programs_of_this_file(request):
    """Compiled programs are kept on disk by file, and in memory until there are many.

    JAX does not write cache entries atomically: two processes must not share a folder, and one process runs a file.
    In memory each program holds memory maps, of which a process may have 65,530. Where nobody can count them (only
    Linux shows them in a file) the programs of every file are dropped.

    Programs that reading leaves on disk traced (``storage/programs.py``) are made twice; some files do it as users do.
    """
    folder = request.config.rootpath / ".pytest_cache" / "jax" / request.path.stem
    jax.config.update("jax_compilation_cache_dir", str(folder))
    compilation_cache.reset_cache()
    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem not in STORING:
            patch.setattr(programs, "_can_store", lambda: False)
        yield
    if not MEMORY_MAPS.exists() or MEMORY_MAPS.read_bytes().count(b"\n") > 16_000:
        jax.clear_caches()


@pytest.fixture
def heard():
    """Ctrl-C and SIGHUP reach the test and its children. A shell ignores them in what it starts with "&" or nohup."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    former = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.fixture
def x64():
    """float64 inside the test: what is exact on paper must be exact to about 1e-12 here."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def untyped():
    """No type checker, as outside of the tests: it would see an unknown word before the code does."""
    type_checker.update("jaxtyping_disable", True)
    yield
    type_checker.update("jaxtyping_disable", False)


@pytest.fixture
def key():
    """The random key of the test."""
    return jax.random.key(0)


@pytest.fixture
def folder(tmp_path):
    """Twenty files, each of one letter of its own, so that a window tells which files it comes from."""
    root = tmp_path / "texts"
    for i, letter in enumerate(LETTERS):
        path = root / f"part{i % 3}" / f"{letter}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(letter * (100 + i))
    return root


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    """The file of a trained byte-level tokenizer with a special token and, as such files have, a truncation."""
    return once(tmp_path_factory, "bpe", train_bpe) / "tokenizer.json"


def train_bpe(folder):
    """Train the tokenizer of ``bpe`` and save it in the folder."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<|énd|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT * 20 + "the quick brown fox jumps over the lazy dog\n" * 20], trainer)
    tokenizer.enable_truncation(8)
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture
def llama_like(tmp_path):
    """Tokens hold the blank before a word; the decoder strips the one that every text gets in front."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"Onceupatimï", "▁a", "▁t"]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    model = tokenizers.models.BPE(vocab, [("▁", "a"), ("▁", "t")], byte_fallback=True, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    steps = tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")
    tokenizer.normalizer = tokenizers.normalizers.Sequence(list(steps))
    d = tokenizers.decoders
    tokenizer.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    tokenizer.save(str(tmp_path / "llama.json"))
    from hope_jax.data import JsonTokenizer  # after the import hook

    return JsonTokenizer(tmp_path / "llama.json")
