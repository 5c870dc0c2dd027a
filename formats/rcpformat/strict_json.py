"""JSON as the format allows it: strict on reading, canonical on writing. Knows nothing of what the values mean."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from typing import Any, NoReturn

from rcpformat.errors import BadJson, DuplicateKey, brief
from rcpformat.spec import MAX_JSON_DEPTH, MAX_JSON_NUMBER, MAX_JSON_SEPARATORS

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = sorted(key for key, _ in pairs)
        twice = next(a for a, b in pairwise(keys) if a == b)
        raise DuplicateKey(f"expected each key once, found {brief(twice)} twice")
    return result


def _integer(digits: str) -> int:
    if len(digits) > MAX_JSON_NUMBER:
        raise BadJson(f"a number of {len(digits)} characters, the limit is {MAX_JSON_NUMBER}")
    return int(digits)


def _real(digits: str) -> float:
    if len(digits) > MAX_JSON_NUMBER or not math.isfinite(float(digits)):
        raise BadJson(f"the number {brief(digits)}, which is infinite in binary64 or over {MAX_JSON_NUMBER} characters")
    return float(digits)


def _constant(literal: str) -> NoReturn:
    raise BadJson(f"the literal {literal}, which is not JSON")


def _is_deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        containers = [item for item in level if isinstance(item, (dict, list))]
        level = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
    return any(isinstance(item, (dict, list)) for item in level)


def parse_json(text: str | bytes, where: str, *, max_separators: int = MAX_JSON_SEPARATORS) -> Any:
    """Parse by the rules of SPEC.md section 1. `where` names the text in errors.

    max_separators: the most `[`, `{` and `,` it may hold. They are counted first, so that a small text cannot become
    gigabytes of objects.

    Raises DuplicateKey, or BadJson for everything else: not UTF-8, too many separators, syntax, NaN and infinities,
    numbers too long or too large, nesting too deep, lone surrogates.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        separators = sum(map(text.count, "[{,"))
        if separators > max_separators:
            raise BadJson(f"{separators} of [ {{ and , where the limit is {max_separators}")
        value = json.loads(
            text, object_pairs_hook=_unique, parse_int=_integer, parse_float=_real, parse_constant=_constant
        )
        if _is_deeper_than(value, MAX_JSON_DEPTH):
            raise RecursionError
        if _SURROGATE_ESCAPE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except DuplicateKey as error:
        raise DuplicateKey(f"{where}: {error}") from None
    except BadJson as error:
        found = str(error)
    except UnicodeDecodeError as error:
        found = f"bytes that are not UTF-8, at byte {error.start}"
    except UnicodeEncodeError:
        found = "half of a surrogate pair"
    except json.JSONDecodeError as error:
        found = f"a syntax error: {error}"
    except RecursionError:
        found = f"nesting deeper than {MAX_JSON_DEPTH}"
    else:
        return value
    raise BadJson(f"{where}: expected JSON by the rules of SPEC.md section 1, found {found}")


def dump_json(value: Any, where: str) -> str:
    """The canonical text of a value: keys sorted by code point, no white space, non-ASCII characters as they are.

    Raises BadJson when the value is not JSON (NaN, a foreign type, a lone surrogate).
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))
        text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise BadJson(f"{where}: expected a JSON value, found {brief(value)} ({error})") from error
    return text
