"""`panollava convert`: its options, and which of them fit together."""

import argparse
from pathlib import Path

from panollava.errors import UserError

_ANGLES = {
    "yaw": "to the right; the picture's center moves there",
    "pitch": "upwards",
    "roll": "clockwise",
}


def add_to(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("inputs", nargs="+", type=Path, metavar="INPUT", help="pictures, or folders of them")
    add("out", type=Path, metavar="OUT", help="folder to write to; nothing in it is overwritten")
    help = (
        "panorama (default; may be a part by its GPano tags), top-bottom, side-by-side, vr180, "
        "cross, strip or faces (six files); see docs/data.md"
    )
    add("--layout", default="panorama", metavar="LAYOUT", help=help)
    help = "take this eye of a stereo pair; a left eye is above or on the left"
    add("--eye", choices=("left", "right"), help=help)
    help = "order of the faces in a strip, by rows, such as rludfb; upper case: upside down"
    add("--faces", default="", metavar="ORDER", help=help)
    for name, meaning in _ANGLES.items():
        help = f"degrees by which the camera was turned {meaning}; undone (default: 0)"
        add(f"--{name}", type=float, default=0.0, metavar="DEGREES", help=help)
    help = "undo the pitch and roll of the GPano tags; viewers disagree on their signs"
    add("--level", choices=("metadata",), help=help)
    add("--format", choices=("jpg", "png"), default="jpg", help="of the files (default: jpg)")
    add("--workers", type=int, default=2, help="threads (default: 2)")


def run(options: argparse.Namespace) -> None:
    from panollava.data.convert import convert
    from panollava.data.upright import Conversion

    _check(options)
    angles = None if options.level else tuple(getattr(options, name) for name in _ANGLES)
    conversion = Conversion(options.layout, options.eye, options.faces, angles, options.format)
    convert(options.inputs, options.out, conversion, options.workers)


def _check(options: argparse.Namespace) -> None:
    from panollava.data.upright import LAYOUTS, STEREO
    from panollava.geometry.reprojection import CUBE

    if options.layout not in LAYOUTS:
        expected = ", ".join(LAYOUTS)
        raise UserError(f"--layout: expected one of {expected}; found '{options.layout}'")
    for name in _ANGLES:
        value = getattr(options, name)
        if not -360 <= value <= 360:
            raise UserError(f"--{name}: expected degrees from -360 to 360, found {value:g}")
        if value and options.level:
            raise UserError(f"--level and --{name}: choose one of them")
    if options.layout in STEREO and not options.eye:
        raise UserError(f"--layout {options.layout} needs --eye left or --eye right")
    if options.eye and options.layout not in ("panorama", *STEREO):
        raise UserError(f"--eye: there is none in --layout {options.layout}; remove it")
    is_strip = options.layout == "strip"
    if options.faces and not is_strip:
        raise UserError("--faces is only for --layout strip; remove it")
    if is_strip and sorted(options.faces.lower()) != sorted(CUBE):
        raise UserError(
            "--layout strip needs --faces with the letters f r b l u d in their order, such as "
            f"rludfb; found '{options.faces}'"
        )
