import io
import struct
import threading
import zlib

import numpy as np
import pytest
from doubles.pictures import chunk, encode, noise
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile

from immich_ml_metal.errors import ImageTooLarge, InvalidImage
from immich_ml_metal.tasks.images import ImageLimits, decode, decode_other, resize
from immich_ml_metal.tasks.picture_header import read_header

LIMITS = ImageLimits(max_pixels=178_956_970, max_side_px=65_535)


def png(width: int, height: int, *, depth: int = 8, rows: bytes = b"") -> bytes:
    """A grey PNG made by hand, so that its header can lie."""
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        ]
    )


# -- what is decoded, and to which pixels (contract §3) --------------------------------------


def test_pixels_are_read_only_contiguous_rgb() -> None:
    pixels = noise(5, 7)
    picture = decode(encode(Image.fromarray(pixels), "PNG"), LIMITS)
    assert picture.size == (7, 5)
    assert picture.pixels.flags.c_contiguous
    assert not picture.pixels.flags.writeable
    assert picture.size_bytes == 7 * 5 * 7  # 4 bytes a pixel in Pillow, 3 in the array
    np.testing.assert_array_equal(picture.pixels, pixels)


def test_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    turned = encode(Image.fromarray(noise(16, 24)), "JPEG", exif=exif)
    plain = encode(Image.fromarray(noise(16, 24)), "JPEG")
    assert decode(turned, LIMITS).size == (24, 16)
    np.testing.assert_array_equal(decode(turned, LIMITS).pixels, decode(plain, LIMITS).pixels)


def display_p3_profile() -> bytes:
    """A matrix profile with the primaries of Display P3: sRGB's file, its colorants replaced."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    colorants = {
        b"rXYZ": (0.51512, 0.24120, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.15710, 0.06657, 0.78407),
    }
    (tags,) = struct.unpack(">I", profile[128:132])
    for row in range(tags):
        name, start, _ = struct.unpack(">4sII", profile[132 + 12 * row : 144 + 12 * row])
        if name in colorants:
            fixed = [round(value * 65536) for value in colorants[name]]  # s15Fixed16
            profile[start + 8 : start + 20] = struct.pack(">3i", *fixed)
    return bytes(profile)


def test_a_display_p3_profile_is_ignored() -> None:
    red = Image.new("RGB", (16, 16), (200, 40, 30))
    p3 = display_p3_profile()
    managed = ImageCms.profileToProfile(
        red, ImageCms.ImageCmsProfile(io.BytesIO(p3)), ImageCms.createProfile("sRGB")
    )
    assert managed is not None
    assert managed.getpixel((3, 3)) != (200, 40, 30)  # the profile does mean something
    tagged = decode(encode(red, "JPEG", icc_profile=p3, quality=95), LIMITS)
    untagged = decode(encode(red, "JPEG", quality=95), LIMITS)
    assert tagged.image.info["icc_profile"] == p3
    np.testing.assert_array_equal(tagged.pixels, untagged.pixels)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_alpha_is_dropped_not_blended(file_format: str) -> None:
    pixels = noise(6, 9, 4)
    options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    picture = decode(encode(Image.fromarray(pixels, "RGBA"), file_format, **options), LIMITS)
    np.testing.assert_array_equal(picture.pixels, pixels[:, :, :3])


def test_grey_with_alpha_keeps_its_grey() -> None:
    pixels = noise(6, 9, 2)
    picture = decode(encode(Image.fromarray(pixels, "LA"), "PNG"), LIMITS)
    np.testing.assert_array_equal(picture.pixels, np.repeat(pixels[:, :, :1], 3, axis=2))


@pytest.mark.parametrize("transparency", [None, 1, bytes([0, 128, 255])])
def test_a_palette_becomes_its_colours_whatever_is_transparent(
    transparency: int | bytes | None,
) -> None:
    palette = [10, 20, 30, 200, 100, 50, 0, 255, 7]
    image = Image.new("P", (3, 1))
    image.putpalette(palette)
    image.putdata([0, 1, 2])
    options = {} if transparency is None else {"transparency": transparency}
    picture = decode(encode(image, "PNG", **options), LIMITS)
    assert picture.pixels.reshape(-1).tolist() == palette


def test_cmyk_is_converted_without_a_profile() -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # red ink
    picture = decode(encode(image, "JPEG", quality=100), LIMITS)
    assert picture.pixels[4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey_has_three_equal_channels(mode: str) -> None:
    image = Image.fromarray(noise(4, 6, 1)[:, :, 0]).convert(mode)
    picture = decode(encode(image, "PNG"), LIMITS)
    np.testing.assert_array_equal(picture.pixels[:, :, 1], np.asarray(image.convert("L")))
    assert (picture.pixels == picture.pixels[:, :, :1]).all()


def test_sixteen_bits_are_clipped_not_scaled() -> None:
    values = np.array([[0, 1, 200, 255, 256, 1000, 65535]], dtype=">u2")
    picture = decode(png(7, 1, depth=16, rows=b"\0" + values.tobytes()), LIMITS)
    assert picture.pixels[0, :, 0].tolist() == [0, 1, 200, 255, 255, 255, 255]


@pytest.mark.parametrize(("file_format", "options"), [("GIF", {}), ("WEBP", {"lossless": True})])
def test_an_animation_shows_its_first_frame(file_format: str, options: dict[str, object]) -> None:
    frames = [Image.new("RGB", (10, 8), colour) for colour in ("#ff0000", "#00ff00")]
    film = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    picture = decode(film, LIMITS)
    assert picture.size == (10, 8)
    assert picture.pixels[3, 3].tolist() == [255, 0, 0]


@pytest.mark.parametrize("size", [(1, 200), (200, 1), (1, 1)])
def test_a_picture_may_be_one_pixel_thin(size: tuple[int, int]) -> None:
    picture = decode(encode(Image.new("RGB", size, "#102030"), "PNG"), LIMITS)
    assert picture.size == size
    assert picture.pixels[-1, -1].tolist() == [16, 32, 48]


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_picture_is_usable_from_many_threads_after_decoding(file_format: str) -> None:
    picture = decode(encode(Image.fromarray(noise(64, 48)), file_format), LIMITS)
    expected = picture.image.resize((20, 20)).tobytes()
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(picture.image.resize((20, 20)).tobytes()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the image is empty"),
        (b"this is no picture", "unknown format"),
        (b"\xff\xd8\xff\xe0", "cannot be decoded"),
        (png(0, 5), "zero width or height"),
        (png(5, 0), "zero width or height"),
        (encode(Image.fromarray(noise(64, 64)), "JPEG")[:1500], "truncated"),
        (encode(Image.fromarray(noise(64, 64)), "PNG")[:1500], "truncated"),
        (encode(Image.fromarray(noise(64, 64)), "WEBP")[:1500], "cannot be decoded"),
    ],
    ids=["empty", "text", "stub", "zero width", "zero height", "cut JPEG", "cut PNG", "cut WebP"],
)
def test_a_broken_file_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(InvalidImage, match=reason):
        decode(data, LIMITS)


@pytest.mark.parametrize(
    ("size", "limits", "message"),
    [
        ((101, 100), ImageLimits(10_000, 300), r"10100 pixels \(101x100\), limit 10000"),
        ((301, 2), ImageLimits(10_000, 300), r"longer side is 301 px, limit 300"),
        ((2, 301), ImageLimits(10_000, 300), r"longer side is 301 px, limit 300"),
        ((12_000, 10_000), ImageLimits(10_000, 65_535), "pixels"),  # where Pillow would warn
        ((60_000, 60_000), LIMITS, "limit 178956970"),  # where Pillow would refuse
        ((60_000, 60_000), ImageLimits(10_000, 65_535), "limit 10000"),
    ],
)
def test_a_header_over_a_limit_is_refused_before_decoding(
    size: tuple[int, int], limits: ImageLimits, message: str
) -> None:
    with pytest.raises(ImageTooLarge, match=message):  # there are no pixels to decode
        decode(png(*size), limits)


def test_the_limits_are_those_of_the_official_service_unless_others_are_given() -> None:
    assert ImageLimits() == LIMITS


def test_a_picture_on_the_limits_is_decoded() -> None:
    limits = ImageLimits(max_pixels=200 * 50, max_side_px=200)
    assert decode(encode(Image.new("L", (200, 50)), "PNG"), limits).size == (200, 50)


def test_no_warning_is_given_within_our_limits() -> None:
    with pytest.raises(InvalidImage, match="truncated"):  # not Pillow's DecompressionBombWarning
        decode(png(10_000, 10_000), LIMITS)


class Growing(ImageFile.ImageFile):
    """A format whose header lies, as icons did in Pillow 12: its pixels are 400 by 400."""

    format = "GROWING"

    def _open(self) -> None:
        self._size, self._mode = (1, 1), "L"

    def load(self) -> None:
        self.im = Image.new("L", (400, 400)).im
        self._size = (400, 400)


def test_a_size_that_only_decoding_shows_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    Image.init()
    monkeypatch.setattr(Image, "ID", [*Image.ID, "GROWING"])
    accept = (Growing, lambda start: start == b"grow")
    monkeypatch.setitem(Image.OPEN, "GROWING", accept)
    with pytest.raises(ImageTooLarge, match="160000 pixels"):
        decode_other(b"grow", ImageLimits(max_pixels=10_000, max_side_px=1000))


@pytest.mark.filterwarnings("ignore:Image was not the expected size")
def test_an_icon_that_lies_about_its_size_is_refused() -> None:
    inner = encode(Image.new("RGB", (400, 400)), "PNG")
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22)
    icon = struct.pack("<HHH", 0, 1, 1) + entry + inner
    with pytest.raises(ImageTooLarge, match="160000 pixels"):
        decode_other(icon, ImageLimits(max_pixels=10_000, max_side_px=1000))


def _samples() -> dict[str, bytes]:
    image = Image.fromarray(noise(24, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    formats = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "ICO", "AVIF", "JPEG2000", "QOI")
    samples = {name: encode(image, name) for name in formats}
    samples["EXIF"] = encode(image, "JPEG", exif=exif)
    samples["LZW"] = encode(image, "TIFF", compression="tiff_lzw")
    return samples


SAMPLES = _samples()


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on broken files
@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(SAMPLES)),
    share=st.floats(0, 1),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
)
def test_a_damaged_file_is_a_picture_or_a_refusal(
    name: str, share: float, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(SAMPLES[name])
    for place, value in changes:
        data[place % len(data)] = value
    whole = decode if read_header(SAMPLES[name]).is_common else decode_other
    try:
        picture = whole(bytes(data[: int(share * len(data))]), ImageLimits(1_000_000, 2000))
    except (InvalidImage, ImageTooLarge) as exc:
        outcome = str(exc)
    else:
        outcome = "the image is whole"
        assert picture.pixels.shape == (picture.size[1], picture.size[0], 3)
    assert outcome.startswith("the image")


# -- resizing --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    source=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    resample=st.sampled_from([Image.Resampling.BICUBIC, Image.Resampling.LANCZOS]),
)
def test_a_picture_is_resized_across_then_down(
    source: tuple[int, int], size: tuple[int, int], resample: Image.Resampling
) -> None:
    image = Image.fromarray(noise(source[1], source[0]))
    across = image.resize((size[0], source[1]), resample)
    assert resize(image, size, resample).tobytes() == across.resize(size, resample).tobytes()


@settings(max_examples=40, deadline=None)
@given(
    top=st.integers(0, 160).map(lambda quarters: quarters / 4),
    rows=st.integers(32, 160).map(lambda quarters: quarters / 4),
    height=st.integers(4, 60),
    resample=st.sampled_from([Image.Resampling.BICUBIC, Image.Resampling.LANCZOS]),
)
def test_a_box_is_resized_with_all_the_rows_that_its_filter_sees(
    top: float, rows: float, height: int, resample: Image.Resampling
) -> None:
    image = Image.fromarray(noise(90, 30))
    box = (2.5, top, 27.5, top + rows)
    across = image.resize((20, 90), resample, box=(2.5, 0, 27.5, 90))
    whole = across.resize((20, height), resample, box=(0, top, 20, top + rows))
    assert resize(image, (20, height), resample, box=box).tobytes() == whole.tobytes()


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    threads=st.integers(2, 4),
    resample=st.sampled_from([Image.Resampling.BICUBIC, Image.Resampling.LANCZOS]),
    box=st.sampled_from([None, (0, 3.25, 30, 81.5)]),
)
def test_any_number_of_threads_makes_the_same_pixels(
    size: tuple[int, int],
    threads: int,
    resample: Image.Resampling,
    box: tuple[float, float, float, float] | None,
) -> None:
    image = Image.fromarray(noise(90, 30))
    alone = resize(image, size, resample, box=box)
    shared = resize(image, size, resample, box=box, threads=threads)
    assert shared.tobytes() == alone.tobytes()


def test_pixels_are_those_of_the_pillow_that_the_official_service_runs() -> None:
    resized = resize(Image.fromarray(noise(67, 33)), (32, 64), Image.Resampling.BICUBIC)
    assert zlib.crc32(resized.tobytes()) == 3382276884  # of Pillow 12.3.0


def test_postscript_is_refused_because_pillow_would_run_it() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20)).save(buffer, "EPS")
    with pytest.raises(InvalidImage, match="PostScript pictures are not decoded here"):
        decode(buffer.getvalue(), ImageLimits(10_000, 100))
    with pytest.raises(InvalidImage, match="unknown format"):
        decode_other(buffer.getvalue(), ImageLimits(10_000, 100))
