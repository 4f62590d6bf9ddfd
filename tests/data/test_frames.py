"""Which file is which frame, and what its pixels are, for every name and every kind of picture that may turn up."""

import io
import os
import warnings

import numpy as np
import pytest
from PIL import Image

from m4.data import frames as frames_module
from m4.data.frames import UnreadablePixels, frame_names, natural_key, order_frames, read_frame, to_rgb
from m4.data.penn_action import list_videos, open_video, read_label, write_label
from m4.errors import DataError
from tests.data.test_penn_action import label

NUMBERS = range(1, 13)


@pytest.mark.parametrize(
    "pattern",
    [
        "{}_rgb.jpg",
        "{}.jpg",
        "{:06d}.jpg",
        "frame{}.jpg",
        "img_{:04d}_v2.jpg",
        "scene7 take 12 - {} of 300.jpeg",
        "frame-{}.jpg",
        "0007-{}.jpg",
        "{}.0.jpg",
        "IMG_{}.JPG",
        "Bild\u00e4_{}_\u00fc.PNG",
        "(copy) {} (2).jpg",
    ],
)
@pytest.mark.parametrize("first", [0, 1, 95])
def test_frames_are_in_numeric_order_whatever_surrounds_the_number(tmp_path, pattern, first):
    names = [pattern.format(number + first) for number in range(12)]
    shuffled = [names[index] for index in np.random.default_rng(0).permutation(12)]
    assert order_frames(tmp_path, shuffled) == names


@pytest.mark.parametrize(
    "names",
    [
        ["1_a9f3.jpg", "2_77.jpg", "10_0.jpg"],  # a hash behind the number
        ["12ab_1.jpg", "7_2.jpg", "9c_10.jpg"],  # and before it
        ["a_1_0ms.jpg", "a_2_33ms.jpg", "a_10_66ms.jpg"],  # a time stamp beside it
        ["IMG_1.JPG", "img_2.jpg", "Img_10.jpeg"],
        ["1.jpg", "02.jpg", "10.png"],  # mixed padding and endings
        ["\uff11.jpg", "\uff12.jpg", "\uff11\uff10.jpg"],  # digits of another script
        ["only.jpg"],
        ["-5.jpg"],
    ],
)
def test_other_numbers_and_forms_do_no_harm(tmp_path, names):
    if len(names) == 3:  # fill in 3 … 9 by the pattern of the second
        mark = "\uff12" if "\uff12" in names[1] else "2"
        digits = {n: chr(0xFF10 + n) if mark == "\uff12" else str(n) for n in range(3, 10)}
        names = [*names[:2], *(names[1].replace(mark, digits[n], 1) for n in range(3, 10)), names[2]]
    assert order_frames(tmp_path, names[::-1]) == names


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["a.jpg", "b.jpg"], r"a\.jpg and b\.jpg, which no number orders"),
        (["frame.jpg", "frame1.jpg"], "which no number orders"),
        (["\u00b9.jpg", "\u00b2.jpg"], "which no number orders"),
        (["1.jpg", "01.jpg"], r"1\.jpg after 01\.jpg"),
        (["000001.jpg", "000001.png"], r"000001\.png after 000001\.jpg"),
        (["1.jpg", "2.jpg", "4.jpg"], r"4\.jpg after 2\.jpg"),
        (["s1_1.jpg", "s1_2.jpg", "s2_1.jpg"], r"s2_1\.jpg after s1_1\.jpg"),
        (["1_3.jpg", "2_2.jpg", "3_1.jpg"], r"by one 1_3\.jpg comes first, by the other 3_1\.jpg"),
        (["-1.jpg", "0.jpg", "1.jpg"], r"-1\.jpg after 1\.jpg"),
        (["-3.jpg", "-2.jpg", "-1.jpg"], "whose sign is plain"),
        (["x_-1.jpg", "x_-2.jpg"], "whose sign is plain"),
        (["0.5.jpg", "1.0.jpg", "1.5.jpg"], r"\.jpg after "),
        (["1a.jpg", "1b.jpg", "2a.jpg"], r"1b\.jpg after 1a\.jpg"),
    ],
)
def test_names_that_cannot_be_ordered_are_refused_by_name(tmp_path, names, found):
    for given in (names, names[::-1]):
        with pytest.raises(DataError, match=rf"expected frames with .*{found}"):
            order_frames(tmp_path, given)


def make_video(root, names, count=None, name="0001"):
    folder = root / "frames" / name
    folder.mkdir(parents=True)
    (root / "labels").mkdir(exist_ok=True)
    for frame in names:
        Image.new("RGB", (100, 80)).save(folder / frame)
    write_label(root / f"labels/{name}.mat", label(frames=len(names) if count is None else count))
    return folder


def test_joints_meet_the_frames_of_their_number(tmp_path):
    folder = make_video(tmp_path, [f"{number}_rgb.jpg" for number in NUMBERS])
    for stray in ("Thumbs.db", ".DS_Store", "._000001.jpg", ".1_rgb.jpg.swp", "notes.txt"):
        (folder / stray).write_bytes(b"x")
    assert [path.name for path in open_video(tmp_path, "0001").frames] == [f"{number}_rgb.jpg" for number in NUMBERS]


@pytest.mark.parametrize("count", [11, 13])
def test_frames_and_label_of_another_number(tmp_path, count):
    make_video(tmp_path, [f"{number}_rgb.jpg" for number in NUMBERS], count)
    with pytest.raises(DataError, match=rf"expected {count} frames \(nframes of 0001\.mat\), found 12"):
        open_video(tmp_path, "0001")


def test_videos_are_in_numeric_order_and_endings_may_be_capitals(tmp_path):
    for number in (10, 9, 1, 2):
        make_video(tmp_path, ["1.jpg", "2.jpg"], name=str(number))
    (tmp_path / "labels/9.mat").rename(tmp_path / "labels/9.MAT")
    assert list_videos(tmp_path) == ["1", "2", "9", "10"]
    assert len(open_video(tmp_path, "9").frames) == 2
    assert sorted(["10", "9", "b2", "01", "1", "b10"], key=natural_key) == ["01", "1", "9", "10", "b2", "b10"]


def test_frames_that_are_no_files(tmp_path):
    folder = make_video(tmp_path, ["1.jpg", "2.jpg", "3.jpg"])
    for make, kind in (
        (lambda path: path.symlink_to("nowhere"), "a link to nothing"),
        (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
        (lambda path: path.mkdir(), "a folder"),
        (os.mkfifo, "no plain file"),
    ):
        path = folder / "2.jpg"
        path.unlink()
        make(path)
        with pytest.raises(DataError, match=rf"2\.jpg: expected a whole image file, found {kind}"):
            frame_names(folder)
        path.rmdir() if path.is_dir() else path.unlink()
        path.touch()


# Pixels


def saved(path, image, **options):
    image.save(path, **options)
    return path


def ramp(mode="L"):
    return Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (4, 1))).convert(mode)


def test_16_bit_grey_is_scaled(tmp_path):
    """0 … 65535 in all steps: the nearest of the 256 values of 8 bits, and no white picture."""
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    path = saved(tmp_path / "1.png", Image.fromarray(values))
    pixels = np.asarray(read_frame(path))
    nearest = np.rint(values * (255 / 65535)).astype(np.uint8)
    np.testing.assert_array_equal(pixels, np.repeat(nearest[..., None], 3, 2))
    for mode in ("I;16", "I;16B", "I;16L", "I;16N"):
        image = Image.new(mode, (3, 2), 40_000)
        np.testing.assert_array_equal(np.asarray(to_rgb(image)), np.full((2, 3, 3), 156))
    older = Image.fromarray(values.astype(np.int32))  # as older versions of Pillow open the file
    older.format = "PNG"
    np.testing.assert_array_equal(np.asarray(to_rgb(older)), pixels)


def test_16_bit_colours_take_the_upper_byte(tmp_path):
    """Pillow writes no such PNG, so this one is put together by hand."""
    import struct
    import zlib

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    row = b"\0" + struct.pack(">6H", 0, 255, 256, 40_000, 65_279, 65_535)
    head = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    (tmp_path / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    assert np.asarray(read_frame(tmp_path / "1.png")).ravel().tolist() == [0, 0, 1, 156, 254, 255]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "YCbCr", "HSV", "LA", "La", "PA", "RGBA", "RGBa"])
def test_modes_that_have_8_bit_colours(mode):
    if mode == "La":
        image = ramp().convert("LA").convert("La")
    elif mode == "RGBa":
        image = ramp().convert("RGBA").convert("RGBa")
    elif mode == "PA":
        image = ramp().convert("P").convert("PA")
    else:
        image = ramp(mode)
    assert image.mode == mode
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    grey = np.asarray(ramp("1").convert("L") if mode == "1" else ramp())
    assert np.abs(np.asarray(rgb).astype(int) - grey[..., None]).max() <= 1


@pytest.mark.parametrize(("mode", "reason"), [("CMYK", "inks"), ("LAB", "L\\*a"), ("I", "32-bit"), ("F", "floats")])
def test_modes_without_a_meaning_in_8_bit_colours_are_refused_by_name(tmp_path, mode, reason):
    image = Image.new(mode, (8, 8))
    with pytest.raises(UnreadablePixels):
        to_rgb(image)
    path = tmp_path / "1.jpg"
    image.save(path, format="JPEG" if mode == "CMYK" else "TIFF")
    with pytest.raises(DataError, match=rf"1\.jpg: expected pixels of 8 bits .* found mode {mode}: .*{reason}"):
        read_frame(path)


def test_every_mode_of_pillow_is_decided():
    decided = frames_module._PLAIN | frames_module._WITH_ALPHA | frames_module._GRAY_16 | set(frames_module._REFUSED)
    from PIL import ImageMode

    modes = {mode for mode in ("1", "L", "I", "F", "P", "RGB", "RGBX", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "RGBa")}
    modes |= {"LA", "La", "PA", "I;16", "I;16L", "I;16B", "I;16N"}
    assert {ImageMode.getmode(mode).mode for mode in modes} == modes == decided
    image = Image.new("L", (2, 2))
    image._mode = "BGR;15"
    with pytest.raises(UnreadablePixels, match="unknown here"):
        to_rgb(image)


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA", "P", "RGB", "L"])
def test_transparency(tmp_path, mode):
    """Opaque alpha is dropped; a single transparent pixel is refused, as nothing is known to lie behind it."""
    path = tmp_path / "1.png"
    image = ramp("RGBA" if mode == "PA" else mode)
    if mode in ("P", "RGB", "L"):
        unused, used = {"P": (255, 7), "RGB": ((1, 2, 3), (7, 7, 7)), "L": (255, 7)}[mode]
        if mode in ("P", "L"):
            image = image.point(lambda value: min(value, 254))
        saved(path, image, transparency=unused)
        np.testing.assert_array_equal(np.asarray(read_frame(path)), np.asarray(image.convert("RGB")))
        saved(path, image, transparency=used)
    else:
        assert read_frame(saved(path, image)).mode == "RGB"
        image.putalpha(Image.new("L", image.size, 255).point(lambda value: value))
        alpha = np.full((4, 256), 255, np.uint8)
        alpha[2, 3] = 254
        image.putalpha(Image.fromarray(alpha))
        saved(path, image)
    with pytest.raises(DataError, match=r"1\.png: expected opaque pixels, found transparent"):
        read_frame(path)


def test_transparent_16_bit_grey(tmp_path):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    path = saved(tmp_path / "1.png", Image.fromarray(values), transparency=500)
    assert read_frame(path).size == (8, 8)
    saved(path, Image.fromarray(values), transparency=3000)
    with pytest.raises(DataError, match="opaque pixels"):
        read_frame(path)


@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "1.jpg", ramp("RGB"), exif=exif)
    if orientation in (0, 1, 9):  # none, upright, meaningless
        assert read_frame(path).size == (256, 4)
    else:
        with pytest.raises(DataError, match=rf"upright picture .* found orientation {orientation}"):
            read_frame(path)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_animations_are_no_frames(tmp_path, kind):
    path = tmp_path / "1.png"
    images = [ramp("RGB").point(lambda value, step=step: (value + 90 * step) % 256) for step in range(3)]
    images[0].save(path, format=kind, save_all=True, append_images=images[1:])
    with pytest.raises(DataError, match=rf"1\.png: expected one picture, found {kind} of 3 pictures"):
        read_frame(path)
    images[0].save(path, format=kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert read_frame(path).size == (256, 4)  # one picture of any of these kinds, whatever the ending says


def test_a_photograph_with_its_preview_is_its_first_picture(tmp_path):
    path = tmp_path / "1.jpg"
    ramp("RGB").save(path, format="MPO", save_all=True, append_images=[ramp("RGB").resize((64, 1))])
    assert read_frame(path).size == (256, 4)


def test_profiles_do_not_change_pixels(tmp_path):
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = read_frame(saved(tmp_path / "1.png", ramp("RGB")))
    assert read_frame(saved(tmp_path / "2.png", ramp("RGB"), icc_profile=profile)).tobytes() == plain.tobytes()


@pytest.mark.parametrize("factor", [1, 3])
def test_enormous_pictures_are_refused_and_not_only_warned_about(tmp_path, monkeypatch, factor):
    """Pillow warns up to twice its limit, and raises beyond."""
    path = saved(tmp_path / "1.png", Image.new("L", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_000 // factor)
    with warnings.catch_warnings(record=True) as said, pytest.raises(DataError, match=r"1\.png: .*decompression bomb"):
        read_frame(path)
    assert not said


def test_small_and_foreign_files(tmp_path):
    assert read_frame(saved(tmp_path / "1.png", Image.new("RGB", (1, 1), (1, 2, 3)))).getpixel((0, 0)) == (1, 2, 3)
    for content in (b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg/>", b"\x89PNG\r\n\x1a\n"):
        (tmp_path / "2.png").write_bytes(content)
        with pytest.raises(DataError, match=r"2\.png: expected a whole image file"):
            read_frame(tmp_path / "2.png")
    with pytest.raises(DataError, match=r"nowhere\.png: expected a whole image file, found No such file"):
        read_frame(tmp_path / "nowhere.png")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_damaged_pictures_give_a_picture_or_one_error(tmp_path, kind):
    """Cut anywhere, or with bytes changed: never another exception, and never a part of a cut picture."""
    rng = np.random.default_rng(5)
    buffer = io.BytesIO()
    noise = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 1
    noise.save(buffer, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}))
    source, path, refused = buffer.getvalue(), tmp_path / "1.jpg", 0
    for trial in range(150):
        content = bytearray(source)
        if trial % 2:
            content = content[: int(rng.integers(len(content) * 9 // 10))]
        else:
            for place in rng.integers(0, min(len(content), 300), 4):
                content[place] = rng.integers(256)
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read_frame(path)
            except DataError:
                refused += 1
            else:
                assert not trial % 2 or kind == "TIFF", len(content)
    assert refused >= 60


def test_real_frames_and_labels_are_read_as_before(shared_dir):
    for path in sorted((shared_dir / "real_frames/swing").glob("*.jpg"))[::30]:
        assert read_frame(path).tobytes() == Image.open(path).convert("RGB").tobytes()
    halves = {read_label(path).train for path in sorted((shared_dir / "penn_action/labels").glob("*.mat"))[::40]}
    assert halves == {True, False}
