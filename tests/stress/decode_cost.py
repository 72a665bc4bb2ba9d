"""Compare the estimated cost of decoding with the measured CPU time and memory.

The files are photos from the available encoders (Pillow, and cjpeg, jpegtran, ImageMagick, cwebp, gifsicle and mozjpeg
where they are installed), and files that are made to be costly. The program decodes each file in a separate process.

    python tests/stress/decode_cost.py

Result: of 95 files, 93 took less CPU time than estimated; the median ratio of estimate to measurement is 1.91 (Intel
Xeon, 2 cores, 2026-11-28).
Table: results/decode_cost.md.
"""

import io
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

import jpegs
import numpy as np
import pngs
import tiffs
from PIL import Image
from processes import memory_mib
from results import describe_run, keep

from app.exceptions import Problem
from app.inference.images.cost import DecodeCost
from app.inference.images.encoded import MAX_COST, EncodedImage
from app.machine import MIB
from app.settings import Settings

TIMES = 3
SETTINGS = Settings()


def photo(width: int, height: int) -> Image.Image:
    """Return an image with smooth structure and camera noise, similar to a photo from a phone."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (max(2, height // 16), max(2, width // 16), 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noise = random.normal(0, 6, (height, width, 1)).astype(np.int16)
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photos() -> dict[str, bytes]:
    """Return photos by encoder and options, without those that exceed the limit on bytes."""
    files = {}
    for width, height in ((500, 375), (1920, 1440), (4032, 3024), (8064, 6048)):
        image = photo(width, height)
        size = f"{width}x{height}"
        for quality in (75, 95):
            for progressive in (False, True):
                kind = f"JPEG {size}, quality {quality}{', progressive' if progressive else ''}"
                files[kind] = encode(image, "JPEG", quality=quality, progressive=progressive)
        files[f"JPEG {size}, 4:4:4, progressive"] = encode(image, "JPEG", quality=75, subsampling=0, progressive=True)
        files[f"JPEG {size}, CMYK"] = encode(image.convert("CMYK"), "JPEG", quality=75)
        if width <= 4032:
            files[f"PNG {size}"] = encode(image, "PNG", compress_level=1)
            files[f"PNG {size}, palette"] = encode(image.quantize(64), "PNG")
            files[f"PNG {size}, RGBA"] = encode(image.convert("RGBA"), "PNG", compress_level=1)
            files[f"PNG {size}, 16 bits"] = encode(
                Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257), "PNG"
            )
            files[f"WebP {size}"] = encode(image, "WEBP", quality=80, method=0)
            files[f"WebP {size}, lossless"] = encode(image, "WEBP", lossless=True, quality=0, method=0)
            files[f"AVIF {size}"] = encode(image, "AVIF", quality=80, speed=10)
            files[f"GIF {size}"] = encode(image.quantize(64), "GIF")
            files[f"BMP {size}"] = encode(image, "BMP")
            for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg"):
                files[f"TIFF {size}, {compression}"] = encode(image, "TIFF", compression=compression)
        files |= _by_other_encoders(image, size)
    return {name: data for name, data in files.items() if len(data) <= SETTINGS.max_image_bytes}


def _by_other_encoders(image: Image.Image, size: str) -> dict[str, bytes]:
    commands = {
        "cjpeg, progressive": ["cjpeg", "-quality", "80", "-progressive", "IN.ppm"],
        "cjpeg, arithmetic": ["cjpeg", "-quality", "80", "-arithmetic", "IN.ppm"],
        "cjpeg, restart markers": ["cjpeg", "-quality", "80", "-restart", "1", "IN.ppm"],
        "jpegtran -progressive": ["jpegtran", "-progressive", "IN.jpg"],
        "ImageMagick, interlaced": ["convert", "IN.ppm", "-interlace", "JPEG", "-quality", "85", "jpg:-"],
        "ffmpeg": ["ffmpeg", "-loglevel", "error", "-i", "IN.ppm", "-f", "mjpeg", "-q:v", "3", "-"],
        "cwebp": ["cwebp", "-quiet", "-m", "0", "IN.ppm", "-o", "-"],
    }
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        image.save(Path(folder) / "IN.ppm")
        jpeg = encode(image, "JPEG", quality=80)
        (Path(folder) / "IN.jpg").write_bytes(jpeg)
        for name, command in commands.items():
            if tool := shutil.which(command[0]):
                ran = subprocess.run([tool, *command[1:]], cwd=folder, capture_output=True, check=False)
                if ran.returncode == 0:
                    files[f"{name}, {size}"] = ran.stdout
    try:
        import mozjpeg_lossless_optimization as mozjpeg
    except ImportError:
        return files
    return files | {f"mozjpeg, {size}": mozjpeg.optimize(jpeg)}


def costly_files() -> dict[str, bytes]:
    """Return files that cost more than their size in bytes suggests."""
    refine = jpegs.LONG_RUNS + jpegs.scan([1], 1, 63, 0, 1)
    dc = jpegs.scan([1, 2, 3], 0, 0, 1, 0)
    restarts = b"\xff\xdd\0\4\0\1"
    heads = {kind: jpegs.head(2000, 2000, kind) for kind in (jpegs.BASELINE, jpegs.PROGRESSIVE, jpegs.ARITHMETIC)}
    scans = b"".join(jpegs.scan([n % 3 + 1]) for n in range(100)) + jpegs.END
    progressive = heads[jpegs.PROGRESSIVE] + jpegs.scan([1, 2, 3], 0, 0, 0, 1)
    files = {
        "JPEG, one scan without data": jpegs.head(7000, 7000) + jpegs.scan([1, 2, 3]) + jpegs.END,
        "JPEG, one scan, a restart for each block": jpegs.head(7000, 7000)
        + restarts
        + jpegs.scan([1, 2, 3])
        + jpegs.END,
        "JPEG, 3 scans": jpegs.with_scans(3, 7000),
        "JPEG, 100 scans": heads[jpegs.BASELINE] + scans,
        "JPEG, 100 scans, restarts": heads[jpegs.BASELINE] + restarts + scans,
        "JPEG, 100 scans, arithmetic": heads[jpegs.ARITHMETIC] + scans,
        "JPEG, 4 components, 4 scans": jpegs.head(4000, 4000, components=4)
        + b"".join(map(jpegs.scan, ([1], [2], [3], [4])))
        + jpegs.END,
        "JPEG, 100 refinements": jpegs.with_refinements(100, 2000),
        "JPEG, 100 refinements of the mean": progressive + 100 * dc + jpegs.END,
        "JPEG, 100 empty refinements": progressive + refine + 100 * jpegs.scan([1], 1, 63, 1, 0) + jpegs.END,
        "JPEG, 60000x100": jpegs.head(60_000, 100) + jpegs.scan([1, 2, 3]) + jpegs.END,
    }
    for mode in ("1", "L", "P", "RGB", "RGBA", "LA"):
        files[f"PNG, {mode}, one color"] = encode(Image.new(mode, (5000, 5000)), "PNG")
    transparent = Image.new("P", (5000, 5000))
    files["PNG, P, transparent color"] = encode(transparent, "PNG", transparency=0)
    files["WebP, lossless, one color"] = encode(Image.new("RGB", (5000, 5000)), "WEBP", lossless=True)
    files["GIF, one color"] = encode(Image.new("P", (5000, 5000)), "GIF")
    files["BMP, 1 bit"] = encode(Image.new("1", (5000, 5000)), "BMP")
    files["TIFF, group 4"] = encode(Image.new("1", (5000, 5000)), "TIFF", compression="group4")
    files["AVIF, one color"] = encode(Image.new("RGB", (5000, 5000)), "AVIF", speed=10)
    key = pngs.chunk(b"tRNS", bytes(6))
    files["PNG, 16 bits, transparent color"] = pngs.png(np.zeros((4000, 4000, 3), np.uint16), pngs.RGB, 16, before=key)
    files["TIFF, CIELAB"] = tiffs.tiff(np.zeros((4000, 4000, 3), np.uint8), tiffs.CIELAB, 8)
    files["TIFF, CMYK"] = encode(Image.new("CMYK", (5000, 5000)), "TIFF", compression="tiff_adobe_deflate")
    files["TIFF, a strip for each row"] = encode(
        Image.new("L", (1000, 9000)), "TIFF", compression="packbits", tiffinfo={278: 1}, strip_size=1000
    )
    return files


def measure(data: bytes) -> tuple[DecodeCost, float, float] | str:
    """Return the estimated cost, the measured CPU time in milliseconds and the measured memory in bytes.

    If the service refuses the file, return the reason instead.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(theirs, data))
    process.start()
    measured: tuple[DecodeCost, float, float] | str = ours.recv()
    process.join()
    return measured


def _measure(results: Connection, data: bytes) -> None:
    process, times = os.getpid(), []
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = memory_mib(process, "VmHWM")
    cost = DecodeCost(0, 0)
    try:
        for _ in range(TIMES):
            started = time.process_time()
            image = EncodedImage(data, SETTINGS.max_image_bytes, SETTINGS.max_image_pixels)
            cost = image.cost
            image.decode()
            times.append(1000 * (time.process_time() - started))
    except Problem as error:
        results.send(error.detail)
        return
    results.send((cost, statistics.median(times), (memory_mib(process, "VmHWM") - before) * MIB))


def main() -> None:
    lines = ["| file | bytes | estimated | measured | ratio | memory: estimated | measured |"]
    lines.append("| --- | --: | --: | --: | --: | --: | --: |")
    ratios, below, refused = [], 0, []
    for name, data in (photos() | costly_files()).items():
        measured = measure(data)
        if isinstance(measured, str):
            refused.append(f"{name}: {measured}")
            continue
        cost, milliseconds, memory = measured
        ratio = cost.cpu_ms / max(milliseconds, 0.1)
        ratios.append(ratio)
        below += ratio < 1
        lines.append(
            f"| {name} | {len(data):,} | {cost.cpu_ms:.1f} ms | {milliseconds:.1f} ms | {ratio:.2f} | "
            f"{cost.memory_bytes / MIB:.0f} MiB | {memory / MIB:.0f} MiB |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    summary = (
        f"Estimated and measured cost of decoding {len(ratios)} files, {describe_run()}. The median ratio is "
        f"{statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}; {below} estimates are too low. "
        f"The service refuses estimates above {MAX_COST.cpu_ms / 1000:.0f} s or {MAX_COST.memory_bytes // MIB} MiB; "
        f"refused here: {len(refused)}."
    )
    keep(__file__, [summary, "", *lines, *(["", *(f"- {each}" for each in refused)] if refused else [])])


if __name__ == "__main__":
    main()
