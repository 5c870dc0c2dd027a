"""Damaged good vectors: every outcome is a FormatError or a file that verifies, in bounded time and memory.

Where a hash would hide what is behind it, the damage is done first and the hashes are made to fit afterwards.
"""

import hashlib
import json
import multiprocessing
import random
import re
import resource
import signal
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors import deserialize

from rcpformat import FormatError, RcpFile, spec
from rcpformat.metadata import metadata_sha256
from vectors.make_vectors import FOLDER, join, split, take_apart

SPARE_MEMORY = 256 << 20
SECONDS_A_CASE = 20
NUMBERS = ("0", "1", "-1", "2", "3", "7", "8", "64", "127", "128", "255", "65536", "4294967296", "-9223372036854775809")
NUMBERS += ("9223372036854775807", "18446744073709551615", "1e3", "1.0", "1e-400", "1e400", "9" * 41, "9" * 5000)
NUMBERS += ("NaN", "-Infinity", "true", "null", '""', "[]", "{}", "[" * 3000, '"\\ud800"')


def damaged(rng: random.Random, content: bytes) -> bytes:
    """One to three edits: flip a bit, set, insert, delete, cut off, repeat or move a span."""
    raw = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(raw) + 1)
        length = rng.choice((1, 1, 2, 4, 8, 64, 500))
        span = bytes(raw[at : at + length])
        match rng.randrange(8):
            case 0 | 1 if at < len(raw):
                raw[at] ^= 1 << rng.randrange(8)
            case 2 if at < len(raw):
                raw[at] = rng.choice((0, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 3:
                raw[at:at] = rng.randbytes(length)
            case 4:
                del raw[at : at + length]
            case 5:
                del raw[at:]
            case 6:
                raw[at:at] = span
            case _:
                raw[at : at + length] = b""
                to = rng.randrange(len(raw) + 1)
                raw[to:to] = span
    return bytes(raw)


def other_number(rng: random.Random, text: str) -> str:
    """One number of the text replaced by a neighbour or by something nasty."""
    numbers = list(re.finditer(r"(?<![\w.\"-])-?\d+(?:\.\d+)?(?:e-?\d+)?(?![\w.\"])", text))
    if not numbers:
        return text
    match = rng.choice(numbers)
    nearby = [str(int(match[0]) + step) for step in (-1, 1, 4, 8)] if re.fullmatch(r"-?\d+", match[0]) else []
    return text[: match.start()] + rng.choice([*NUMBERS, *nearby, *nearby]) + text[match.end() :]


def rehashed(text: str) -> str:
    """Header text with the metadata hash made to fit, if it is still JSON."""
    try:
        header = json.loads(text)
        metadata = header["__metadata__"]
        found, fitting = metadata[spec.KEY_METADATA_SHA256], metadata_sha256(metadata)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return text
    return text.replace(found, fitting) if isinstance(found, str) and found else text


def damage_file(rng: random.Random, file: bytes) -> bytes:
    """Bytes anywhere; the hashes then do not fit."""
    return damaged(rng, file)


def damage_header(rng: random.Random, file: bytes) -> bytes:
    """Bytes of the header; its length fits, and so does its hash where there is still one."""
    text, data = split(file)
    raw = damaged(rng, text.encode())
    try:
        return join(rehashed(raw.decode()), data)
    except UnicodeError:
        return join(raw, data)


def damage_number(rng: random.Random, file: bytes) -> bytes:
    """A number in a tensor entry."""
    text, data = split(file)
    return join(rehashed(other_number(rng, text)), data)


def damage_metadata(rng: random.Random, file: bytes) -> bytes:
    """Text or a number inside a metadata value; the hash fits."""
    draft = take_apart(file)
    key = rng.choice([key for key in sorted(draft.metadata) if key != spec.KEY_METADATA_SHA256])
    value = draft.metadata[key]
    if rng.random() < 0.5:
        draft.metadata[key] = other_number(rng, value)
    else:
        draft.metadata[key] = damaged(rng, value.encode()).decode(errors="replace")
    draft.hash_metadata()
    return draft.to_bytes()


def damage_tensor(rng: random.Random, file: bytes) -> bytes:
    """Bytes of one tensor, as many as before; all hashes fit."""
    draft = take_apart(file)
    name = rng.choice(sorted(draft.tensors))
    dtype, shape, content = draft.tensors[name]
    raw = damaged(rng, content)[: len(content)]
    draft.tensors[name] = (dtype, shape, raw + rng.randbytes(len(content) - len(raw)))
    draft.hash_tensors()
    return draft.to_bytes()


DAMAGES: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    damage_file,
    damage_header,
    damage_number,
    damage_metadata,
    damage_tensor,
)


def use(path: Path) -> None:
    """Open, verify, and decode everything; what is accepted must be safetensors too."""
    with RcpFile.open(path, verify=True) as file:
        for linear in spec.linear_names(file.architecture):
            file.linear(linear).weights()
        file.tokenizer_json()
        assert set(dict(deserialize(path.read_bytes()))) == set(file.header_tensors)


def too_slow(*_: Any) -> None:
    raise AssertionError(f"no outcome in {SECONDS_A_CASE} s")


def run_mutations(folder: Path, seed: int, count: int) -> Counter[str]:
    """Outcomes by error name. Runs in a process of its own, whose memory it limits."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    signal.signal(signal.SIGALRM, too_slow)
    rng = random.Random(seed)
    vectors = [path.read_bytes() for path in sorted((FOLDER / "good").glob("*.rcp"))]
    path = folder / f"{seed}.rcp"
    outcomes: Counter[str] = Counter()
    for case in range(count):
        damage = rng.choice(DAMAGES)
        content = damage(rng, rng.choice(vectors))
        path.write_bytes(content)
        signal.alarm(SECONDS_A_CASE)
        try:
            use(path)
            outcomes["accepted"] += 1
        except FormatError as error:
            outcomes[type(error).__name__] += 1
            assert len(str(error)) < 2000 + len(str(path)), f"a message of {len(str(error))} characters"
        except BaseException as error:
            digest = hashlib.sha256(content).hexdigest()
            raise AssertionError(f"seed {seed}, case {case}, {damage.__name__}, {digest[:8]}: {error!r}") from error
        finally:
            signal.alarm(0)
    return outcomes


def outcomes_of(folder: Path, seeds: range, count: int) -> Counter[str]:
    # fork: the child then knows the modules that pytest imported by path
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        return sum(pool.map(run_mutations, [folder] * len(seeds), seeds, [count] * len(seeds)), Counter())


def test_two_thousand_mutations(tmp_path: Path) -> None:
    outcomes = outcomes_of(tmp_path, range(2), 1000)
    assert outcomes.total() == 2000
    # The mutations reach every part: the container, the metadata, the values; and some files stay valid.
    assert len(outcomes) > 20 and outcomes["accepted"] > 100, outcomes


@pytest.mark.slow
def test_a_hundred_thousand_mutations(tmp_path: Path) -> None:
    outcomes = outcomes_of(tmp_path, range(100, 120), 5000)
    assert outcomes.total() == 100_000
    assert len(outcomes) > 30, outcomes
