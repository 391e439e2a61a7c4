"""Results: a JSON each, named after all that decides it, so that a sweep goes on."""

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.errors import UserError
from pipeline.files import check_writable, digest, whole

__all__ = ["Store"]


class Store:
    """Results in a file, in a folder, or nowhere.

    Arguments:
        out: FILE.json for one result, a folder for many, or `None`.
    """

    def __init__(self, out: str | None) -> None:
        self.out = None if out is None else Path(out)

    @property
    def takes_many(self) -> bool:
        return self.out is not None and self.out.suffix != ".json"

    def check(self) -> None:
        """Raise `UserError` unless results can be written."""
        if self.out is not None:
            check_writable(self.folder, self.out)

    @property
    def folder(self) -> Path:
        """Where more can be written beside the results."""
        assert self.out is not None
        return self.out if self.takes_many else self.out.parent

    def place(self, settings: dict[str, Any]) -> Path | None:
        """The file of a result."""
        if self.out is None or not self.takes_many:
            return self.out
        sampler, guidance = settings["sampler"], settings["guidance"] or {}
        name = f"{sampler['class']}-{sampler['steps']}-{guidance.get('scale', 1.0):g}"
        return self.out / f"{name.lower()}-{digest(settings)[:8]}.json"

    def find(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The result of these settings, if it was finished before."""
        file = self.place(settings)
        if file is None or not file.is_file():
            return None
        try:
            result = json.loads(file.read_text("utf-8"))
        except ValueError:
            return None  # it was cut short
        if not isinstance(result, dict) or result.get("key") != digest(settings):
            raise UserError(f"--out {file} holds another result; name another file.")
        print(f"{file} was finished before.", file=sys.stderr)
        return result

    def keep(
        self, settings: dict[str, Any], result: dict[str, Any], sheet: Image.Image | None
    ) -> None:
        """Write a result, and a sheet beside it."""
        file = self.place(settings)
        if file is None:
            return
        try:
            if sheet is not None:
                with whole(file.with_suffix(".png")) as part:
                    sheet.save(part, "png")
            with whole(file) as part:  # last: whose file is there is finished
                part.write_text(json.dumps(result, indent=2, ensure_ascii=False), "utf-8")
        except OSError as error:
            raise UserError(
                f"--out {file} cannot be written to: {error.strerror}; name another."
            ) from error
