"""A picture whose name differs from the table is found where only one can be meant."""

import unicodedata
from pathlib import Path
from urllib.parse import quote

import pytest

from panollava.data.images import PictureError
from panollava.data.picture_paths import PictureFinder, address, is_link, picture_file

NFD = unicodedata.normalize("NFD", "전경.jpg")
NAMES = [NFD, "my pano.jpg", "café.jpg", "a.JPG", "b.jpg", "x y é.jpg", "100%.jpg", "Straße.jpg"]


def put(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / name).touch()
    return folder


def find(folder: Path, url: str) -> str:
    return str(PictureFinder(folder, folder.parent).find(url).relative_to(folder / "images"))


def reason(folder: Path, url: str) -> str:
    with pytest.raises(PictureError) as error:
        PictureFinder(folder, folder.parent).find(url)
    return error.value.reason


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("images/전경.jpg", NFD),
        ("images/my%20pano.jpg", "my pano.jpg"),
        ("images/caf%C3%A9.jpg", "café.jpg"),
        ("images/cafe%CC%81.jpg", "café.jpg"),
        ("images%2Fcaf%c3%a9.jpg", "café.jpg"),
        ("images/a.jpg", "a.JPG"),
        ("Images/A.jpg", "a.JPG"),
        ("images/STRASSE.JPG", "Straße.jpg"),
        ("images\\b.jpg", "b.jpg"),
        (".\\images\\B.JPG", "b.jpg"),
        (" images/b.jpg", "b.jpg"),
        ("images/b.jpg ", "b.jpg"),
        ("\ufeffimages/b.jpg\u200b", "b.jpg"),
        ("images//b.jpg", "b.jpg"),
        ("./images/../images/b.jpg", "b.jpg"),
        ("images/../images/B.jpg", "b.jpg"),
        ("images/100%.jpg", "100%.jpg"),
        ("images/100%25.jpg", "100%.jpg"),
        ("data/images/B.jpg", "b.jpg"),  # from the project's root
        ("https://example.org/x%20y%20%C3%A9.jpg", "x y é.jpg"),
        ("HTTPS://example.org/b.jpg", "b.jpg"),
        (" https://example.org/b.jpg ", "b.jpg"),
    ],
)
def test_a_name_in_another_spelling_is_found(tmp_path: Path, url: str, name: str) -> None:
    folder = put(tmp_path / "data", *NAMES)
    assert find(folder, url) == name


def test_an_absolute_path_and_a_file_address_are_found_too(tmp_path: Path) -> None:
    folder = put(tmp_path / "data", "my pano.jpg")
    picture = folder / "images/my pano.jpg"
    for url in (picture.as_uri(), str(picture).upper(), f"file://localhost{quote(str(picture))}"):
        assert find(folder, url) == "my pano.jpg", url


def test_the_exact_name_takes_precedence(tmp_path: Path) -> None:
    folder = put(tmp_path / "data", "a b.jpg", "a%20b.jpg", "A B.jpg", "c.jpg", "C.jpg")
    for name in ("a b.jpg", "a%20b.jpg", "A B.jpg", "c.jpg", "C.jpg"):
        assert find(folder, f"images/{name}") == name


def test_the_nearest_spelling_takes_precedence(tmp_path: Path) -> None:
    folder = put(tmp_path / "data", "My Pano.jpg", "my pano.jpg")
    assert find(folder, "images/my%20pano.jpg") == "my pano.jpg"
    folder = put(tmp_path / "other", "x.jpg", "X.jpg")
    (folder / "x.jpg").touch()
    assert find(folder, "images\\X.jpg") == "X.jpg"


@pytest.mark.parametrize("turn", [1, -1])
def test_two_that_may_be_meant_are_a_reason_in_any_order_of_the_folder(
    tmp_path: Path, turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = put(tmp_path / "data", "A.jpg", "a.JPG", "sub/c.jpg", "Sub/C.jpg")
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(sorted(listed(path))[::turn]))
    differ = "picture missing: 2 files differ from it only in spelling: "
    assert reason(folder, "images/a.jpg") == differ + "'A.jpg', 'a.JPG'; rename one"
    assert reason(folder, "images/SUB/C.jpg") == differ + "'C.jpg', 'c.jpg'; rename one"


def test_two_names_of_one_file_are_not_ambiguous(tmp_path: Path) -> None:
    folder = put(tmp_path / "data", "a.JPG")
    (folder / "images/A.jpg").symlink_to("a.JPG")
    assert find(folder, "images/a.jpg") == "a.JPG"


@pytest.mark.parametrize(
    ("url", "detail"),
    [
        ("www.example.org/1/e.jpg", "a link starts with https://"),
        ("//example.org/e.jpg", "a link starts with https://"),
        ("C:\\photos\\e.jpg", "a path of Windows; make it relative to the CSV file's folder"),
        ("~/e.jpg", "'~' stands for no folder here"),
        ("s3://bucket/e.jpg", "'s3://' is not supported; use https:// or a path"),
        ("FTP://example.org/e.jpg", "'FTP://' is not supported"),
        ("data:image/jpeg;base64,AAAA", "a picture within the table is not supported"),
        ("images/a.jpeg", "there is 'images/a.JPG'"),
        ("b.jpg", "there is 'images/b.jpg'"),
        ("photos\\b.png", "there is 'images/b.jpg'"),
        ("images/e.jpg", ""),
        ("images/e\0.jpg", ""),
        ("x" * 300, ""),
    ],
)
def test_a_missing_picture_has_a_reason_that_says_what_differs(
    tmp_path: Path, url: str, detail: str
) -> None:
    folder = put(tmp_path / "data", *NAMES)
    found = reason(folder, url)
    assert found.startswith(f"picture missing: {detail}") if detail else found == "picture missing"


def test_the_last_part_of_a_link_in_other_letters_is_another_picture(tmp_path: Path) -> None:
    """Addresses distinguish case, so it could be the picture of another link."""
    folder = put(tmp_path / "data", "a.JPG")
    assert reason(folder, "https://example.org/a.jpg") == "link not downloaded"


def test_a_link_names_no_file_outside_of_images(tmp_path: Path) -> None:
    folder = put(tmp_path / "data", "b.jpg", "sub/c.jpg")
    (folder / "mine.jpg").touch()
    for last in ("..%2Fmine.jpg", "%2E%2E%5Cmine.jpg", "sub%2Fc.jpg", ".."):
        assert reason(folder, f"https://example.org/{last}") == "link not downloaded"


def test_spellings_of_one_address_have_one_file() -> None:
    links = [
        "https://example.org/A.jpg",
        " https://example.org/A.jpg\t",
        "HTTPS://example.org/A.jpg",
    ]
    assert all(map(is_link, links))
    assert {address(link) for link in links} == {links[0]}
    assert len({picture_file(link, Path()) for link in links}) == 1
