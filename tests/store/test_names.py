import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tad.errors import StoreError
from tad.store.names import MAX_NAME_BYTES, decode_name, encode_name

ids = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
awkward = st.text(st.sampled_from('./\\%_:*? "<>|\0\n\x7fa.5h'), min_size=1, max_size=12)


@given(ids | awkward)
def test_every_id_comes_back_and_its_name_is_safe(name: str) -> None:
    stored = encode_name(name)
    assert decode_name(stored) == name
    assert not stored.startswith((".", "__"))
    assert not set(stored) & set('/\\:*?"<>|')
    assert stored.isprintable() | (not stored.isascii())
    assert not stored.endswith((".", " "))
    assert stored.lower() not in {"zarr.json", "catalog.csv", "store.h5"}


@given(ids | awkward, ids | awkward)
def test_two_ids_never_share_a_name(one: str, other: str) -> None:
    assert (encode_name(one) == encode_name(other)) == (one == other)


def test_usual_ids_stay_readable() -> None:
    for name in ("video_test_0000001", "v_-02DygXbn6w", "Übung 1 [abc].mp4", "料理", "a.b", "_x", "9bZkp7q19f0"):
        assert encode_name(name) == name


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("a/b", "a%2Fb"),
        ("..", "%2E%2E"),
        (".hidden", "%2Ehidden"),
        ("__x", "%5F_x"),
        ("100%", "100%25"),
        ("a%2Fb", "a%252Fb"),
        ("zarr.json", "%7Aarr.json"),
        ("C:\\x", "C%3A%5Cx"),
        ("tail ", "tail%20"),
        ("nul\0", "nul%00"),
    ],
)
def test_known_names(name: str, stored: str) -> None:
    assert encode_name(name) == stored
    assert decode_name(stored) == name


@pytest.mark.parametrize("foreign", ["%zz", "a%2fb", "%41", "__x", ".x", "a:b", "", "%", "zarr.json", "a%C3%A9"])
def test_names_that_are_not_ours_have_no_id(foreign: str) -> None:
    assert decode_name(foreign) is None


def test_what_cannot_be_a_file_name_is_refused(tmp_path: os.PathLike[str]) -> None:
    longest = "x" * MAX_NAME_BYTES
    open(os.path.join(tmp_path, encode_name(longest) + ".h5." + "0" * 32 + ".tmp"), "w").close()
    with pytest.raises(StoreError, match=r"video id 'x+'\.\.\. takes 201 bytes .* at most 200"):
        encode_name(longest + "x", "video id")
    with pytest.raises(StoreError, match="takes 201 bytes"):
        encode_name("é" * 100 + "x")
    with pytest.raises(StoreError, match="takes 300 bytes"):
        encode_name("/" * 100)
    with pytest.raises(StoreError, match="non-empty"):
        encode_name("")
    with pytest.raises(StoreError, match="not valid Unicode"):
        encode_name("a\udcff")
