"""Writes panoramas as JPEG or PNG files that describe themselves."""

from pathlib import Path

import simplejpeg
from PIL import Image, PngImagePlugin

from panollava.data.images import Picture
from panollava.data.upright import Upright

_QUALITY = 95
_XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-'
    'syntax-ns#"><rdf:Description rdf:about="" xmlns:GPano="http://ns.google.com/photos/1.0/'
    'panorama/" xmlns:dc="http://purl.org/dc/elements/1.1/" {}/></rdf:RDF></x:xmpmeta>'
)
_EXIF, _ICC = 0xE1, 0xE2  # JPEG markers; XMP has that of EXIF
_LONGEST = 65_500  # bytes of a JPEG segment


def save_panorama(path: Path, upright: Upright, of: Picture, source: str, form: str) -> None:
    """`of`: the picture whose time and color profile the file keeps. `source`: another attribute of
    the XMP metadata. `form`: jpg or png."""
    height, width = upright.panorama.shape[:2]
    tags = {"ProjectionType": "equirectangular", "UsePanoramaViewer": "True"}
    for side, pixels in (("Width", width), ("Height", height)):
        tags |= {f"FullPano{side}Pixels": str(pixels), f"CroppedAreaImage{side}Pixels": str(pixels)}
    tags |= {"CroppedAreaLeftPixels": "0", "CroppedAreaTopPixels": "0", **upright.pose}
    attributes = [f'GPano:{name}="{value}"' for name, value in tags.items()]
    xmp = _XMP.format(" ".join([*attributes, source]))
    if form == "png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp)
        options = {"pnginfo": info, "exif": of.times, "icc_profile": of.profile}
        Image.fromarray(upright.panorama).save(path, "PNG", compress_level=3, **options)
        return
    # Pillow would copy the pixels first.
    jpeg = simplejpeg.encode_jpeg(upright.panorama, _QUALITY, "RGB", "420")
    segments = [_segment(_EXIF, of.times.tobytes())]  # starts with its name
    segments.append(_segment(_EXIF, b"http://ns.adobe.com/xap/1.0/\0" + xmp.encode()))
    profile = of.profile or b""
    parts = [profile[at : at + _LONGEST] for at in range(0, len(profile), _LONGEST)]
    for number, part in enumerate(parts, 1):
        segments.append(_segment(_ICC, b"ICC_PROFILE\0" + bytes((number, len(parts))) + part))
    with path.open("wb") as file:
        file.writelines((jpeg[:2], *segments, memoryview(jpeg)[2:]))


def _segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(content) + 2).to_bytes(2) + content
