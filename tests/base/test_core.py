"""pydantic's core without its package: the same types, and another layout of the package is taken, too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2]


def printed(code: str, *places: Path) -> str:
    setup = f"import sys; sys.path[:0] = {[str(place) for place in (*places, SOURCE)]}\n"
    return subprocess.run([sys.executable, "-I", "-c", setup + code], check=True, capture_output=True, text=True).stdout


def test_package_is_not_imported_and_has_the_same_types_later() -> None:
    code = (
        "from isolator.base import core; print('pydantic_core' in sys.modules)\n"
        "import pydantic_core; print(pydantic_core.ValidationError is core.ValidationError)"
    )
    assert printed(code).split() == ["False", "True"]


def test_package_of_another_layout_is_imported(tmp_path: Path) -> None:
    package = tmp_path / "pydantic_core"
    package.mkdir()
    names = "PydanticSerializationError SchemaError SchemaValidator ValidationError from_json to_json"
    (package / "__init__.py").write_text("".join(f"{name} = 'whole'\n" for name in names.split()))
    assert printed("from isolator.base import core; print(core.to_json)", tmp_path).strip() == "whole"


def test_rare_types_are_not_imported_for_what_is_written_and_are_themselves_later() -> None:
    code = (
        "from isolator.base import core; core.write_no_rare_types()\n"
        "print(core.to_json({'a': [1.5, None, 'x']}).decode())\n"
        "print({'decimal', 'fractions', 'uuid', 'platform'} & {*sys.modules})\n"
        "import decimal; print(decimal.Decimal('1.50'))"
    )
    assert printed(code).splitlines() == ['{"a":[1.5,null,"x"]}', "set()", "1.50"]
