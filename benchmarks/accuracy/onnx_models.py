"""Real ONNX files pruned 2:4 by `maskplan prune`: how far their outputs are from the dense file's, on held-out samples.

    python benchmarks/accuracy/onnx_models.py MODEL.onnx ... --photos DIR

Each MODEL is told by its inputs and its file name: YOLOv8n of `nudenet`, PP-OCR detection, recognition and direction of
`rapidocr`, `silero-vad`. DIR holds photographs, such as those in the wheels of scikit-image and scikit-learn. Samples are
crops of the photographs, for PP-OCR with text drawn on them, and sound made of pulses, vowels and noise. Calibration takes
the left part of every photograph and other words, evaluation the right part. Rows are SQNR in dB for each output:
10 log10 of the sum of the dense output's squares over that of the difference; INT8 rows are calibrated on the same samples.
Writes onnx_models.json next to this script.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps

from maskplan.calibration.calibrate import CalibrateOptions, CalibrationSamples, calibrate
from maskplan.exporters.conformance import CheckOptions, check_2to4
from maskplan.exporters.metadata import describe_onnx
from maskplan.exporters.prune import prune_onnx
from maskplan.pipeline.core.artifacts import OnnxModel, Pattern
from maskplan.pipeline.core.choices import FP32
from maskplan.pipeline.core.files import sha256_of, write_json
from maskplan.pipeline.core.ort_session import open_session
from maskplan.pipeline.data.samples import TensorSamples
from maskplan.pipeline.pruning.prune_layerwise import LayerwiseOptions, prune_layerwise
from maskplan.pipeline.report.write import versions
from maskplan.pipeline.timing.compare_latency import cpu_name

Arrays = dict[str, npt.NDArray[Any]]
Photos = list[Image.Image]

# Share of a photograph's width that calibration takes.
LEFT = 0.6
SUFFIXES = {".jpg", ".jpeg", ".png"}
WORDS = """
open invoice total amount street market office number window garden review station paper model energy river castle bridge
signal copper orange violet summit harbor engine ticket tunnel museum doctor island planet
"""
RATE, CHUNK, CONTEXT = 16_000, 512, 64


def photographs(folder: Path) -> Photos:
    """Photographs of at least 200 pixels on each side, as RGB."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES):
        image = Image.open(path)
        if min(image.size) >= 200 and image.mode == "RGB":
            found.append(image.convert("RGB"))
    return found


def crops(photos: Photos, count: int, height: int, width: int, *, held_out: bool) -> list[Image.Image]:
    """Random crops of the left or right part of the photographs, some mirrored, resized."""
    random = np.random.default_rng(1 if held_out else 0)
    found = []
    for number in range(count):
        photo = photos[number % len(photos)]
        cut = int(LEFT * photo.width)
        part = photo.crop((cut, 0, photo.width, photo.height) if held_out else (0, 0, cut, photo.height))
        scale = random.uniform(0.5, 1.0) * min(part.width / width, part.height / height)
        w, h = max(int(scale * width), 8), max(int(scale * height), 8)
        x, y = random.integers(0, part.width - w + 1), random.integers(0, part.height - h + 1)
        crop = part.crop((x, y, x + w, y + h)).resize((width, height), Image.Resampling.BILINEAR)
        found.append(ImageOps.mirror(crop) if random.random() < 0.5 else crop)
    return found


def text_of(random: np.random.Generator, length: int, *, held_out: bool) -> str:
    words = WORDS.split()[1 if held_out else 0 :: 2]
    parts = [
        str(random.choice(words)) if random.random() < 0.7 else str(random.integers(10, 99999)) for _ in range(length)
    ]
    return " ".join(part.upper() if random.random() < 0.3 else part for part in parts)


def pages(photos: Photos, count: int, height: int, width: int, *, held_out: bool) -> list[Image.Image]:
    """Photographs with lines of text on them."""
    random = np.random.default_rng(3 if held_out else 2)
    found = crops(photos, count, height, width, held_out=held_out)
    for image in found:
        draw = ImageDraw.Draw(image)
        for _ in range(int(random.integers(2, 6))):
            size = int(random.integers(12, 36))
            place = (int(random.integers(0, width // 2)), int(random.integers(0, height - size)))
            color = tuple(int(v) for v in random.integers(0, 256, 3))
            text = text_of(random, int(random.integers(1, 4)), held_out=held_out)
            if random.random() < 0.5:
                box = draw.textbbox(place, text, font=ImageFont.load_default(size))
                draw.rectangle(box, fill=tuple(255 - c for c in color))
            draw.text(place, text, fill=color, font=ImageFont.load_default(size))
    return found


def lines(photos: Photos, count: int, height: int, width: int, *, held_out: bool) -> list[Image.Image]:
    """Lines of text on plain or photographed ground, half of them upside down."""
    random = np.random.default_rng(5 if held_out else 4)
    found = []
    for number, ground in enumerate(crops(photos, count, height, width, held_out=held_out)):
        shade = int(random.integers(150, 256))
        image = ground if random.random() < 0.3 else Image.new("RGB", (width, height), (shade,) * 3)
        draw = ImageDraw.Draw(image)
        size = int(random.integers(22, 40))
        text = text_of(random, int(random.integers(1, 5)), held_out=held_out)
        draw.text(
            (4, (height - size) // 2 - 2),
            text,
            fill=(int(random.integers(0, 90)),) * 3,
            font=ImageFont.load_default(size),
        )
        found.append(image.rotate(180) if number % 2 else image)
    return found


def tensor(images: Sequence[Image.Image], mean: Sequence[float], std: Sequence[float]) -> npt.NDArray[np.float32]:
    """(N, 3, H, W) float32, BGR as OpenCV reads images."""
    values = np.stack([np.asarray(image, np.float32)[..., ::-1] for image in images]) / 255
    return np.ascontiguousarray(((values - np.float32(mean)) / np.float32(std)).transpose(0, 3, 1, 2))


def sound(seconds: float, *, held_out: bool) -> npt.NDArray[np.float32]:
    """Phrases of vowel-like sounds (pulses through resonances) with pauses and noise."""
    random = np.random.default_rng(7 if held_out else 6)
    parts: list[npt.NDArray[np.float64]] = []
    while sum(map(len, parts)) < seconds * RATE:
        length = int(random.uniform(0.08, 0.4) * RATE)
        if random.random() < 0.35:
            parts.append(random.normal(0, 10 ** random.uniform(-4, -1.7), length))
            continue
        pitch = random.uniform(80, 260) * (1 + 0.1 * np.sin(np.arange(length) / RATE * random.uniform(10, 30)))
        phase = np.cumsum(pitch / RATE)
        source = np.diff(np.floor(phase), prepend=0) + random.normal(0, 0.02, length)
        spectrum, frequencies = np.fft.rfft(source), np.fft.rfftfreq(length, 1 / RATE)
        formants = (random.uniform(250, 850), random.uniform(800, 2400), random.uniform(2200, 3400))
        gain = sum(1 / (1 + ((frequencies - f) / 90) ** 2) / (1 + i) for i, f in enumerate(formants))
        wave = np.fft.irfft(spectrum * gain, length) * np.hanning(length) ** 0.3
        parts.append(wave / max(np.abs(wave).max(), 1e-9) * random.uniform(0.05, 0.6) + random.normal(0, 0.003, length))
    return np.concatenate(parts).astype(np.float32)


def speech(path: Path, model: OnnxModel, count: int, *, held_out: bool) -> Arrays:
    """Inputs of `silero-vad`, one run each: chunks of sound with the states that the dense network comes to."""
    wave = sound(count * CHUNK / RATE + 1, held_out=held_out)
    session = open_session(path)
    state, rows = np.zeros((2, 1, 128), np.float32), []
    for start in range(CONTEXT, CONTEXT + count * CHUNK, CHUNK):
        row = {"input": wave[None, start - CONTEXT : start + CHUNK], "state": state}
        if any(spec.name == "sr" for spec in model.inputs):
            row["sr"] = np.array(RATE, np.int64)
        state = session.run(None, row)[1]
        rows.append(row)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def samples_of(path: Path, model: OnnxModel, photos: Photos, count: int, *, held_out: bool) -> TensorSamples:
    """Samples that the model was made for."""
    names = [spec.name for spec in model.inputs]
    if "state" in names:
        return TensorSamples("train", speech(path, model, count, held_out=held_out), {}, one_run_each=True)
    make: Callable[..., list[Image.Image]]
    if "_rec" in path.name:
        make, size, mean, std = lines, (48, 320), (0.5,) * 3, (0.5,) * 3
    elif "_cls" in path.name:
        make, size, mean, std = lines, (48, 192), (0.5,) * 3, (0.5,) * 3
    elif "_det" in path.name:
        make, size, mean, std = pages, (320, 320), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    else:
        make, size, mean, std = crops, (320, 320), (0.0,) * 3, (1.0,) * 3
    images = make(photos, count, *size, held_out=held_out)
    return TensorSamples("train", {names[0]: tensor(images, mean, std)}, {})


def outputs_of(path: Path, samples: TensorSamples) -> list[list[npt.NDArray[np.float64]]]:
    """The float outputs of each batch."""
    session = open_session(path)
    return [[np.asarray(v, np.float64) for v in session.run(None, feeds)] for feeds in samples.batches(8)]


def sqnr(dense: list[list[npt.NDArray[np.float64]]], other: list[list[npt.NDArray[np.float64]]]) -> list[float]:
    """SQNR in dB of each output."""
    found = []
    for index in range(len(dense[0])):
        signal = sum(float((batch[index] ** 2).sum()) for batch in dense)
        noise = sum(float(((a[index] - b[index]) ** 2).sum()) for a, b in zip(dense, other, strict=True))
        found.append(round(float(10 * np.log10(signal / noise)), 2) if noise else float("inf"))
    return found


def measured(path: Path, photos: Photos, images: int, held_out: int, folder: Path) -> dict[str, Any]:
    """One model."""
    model = describe_onnx(path)
    calibration = samples_of(path, model, photos, images, held_out=False)
    evaluation = samples_of(path, model, photos, held_out, held_out=True)
    dense, sparse = outputs_of(path, evaluation), folder / "sparse.onnx"
    rows: dict[str, Any] = {}
    prune_onnx(path, sparse, Pattern(2, 4))
    rows["magnitude"] = sqnr(dense, outputs_of(sparse, evaluation))
    by_magnitude, seconds = 0, {}
    for name, options in {
        "layerwise": LayerwiseOptions(images=images),
        "layerwise, update": LayerwiseOptions(images=images, update=True),
    }.items():
        started = time.monotonic()
        done = prune_layerwise(path, sparse, model.inputs, calibration, options)
        seconds[name] = round(time.monotonic() - started, 1)
        by_magnitude = len(done.by_magnitude)
        rows[name] = sqnr(dense, outputs_of(sparse, evaluation))
        print(path.name, name, seconds[name], rows[name], rows["magnitude"], done.by_magnitude[:3], flush=True)
    last = rows["layerwise, update"]
    for name, source in {"dense, INT8": path, "layerwise, update, INT8": sparse}.items():
        started = time.monotonic()
        quantized = {FP32: folder / "int8.onnx"}
        calibrate(describe_onnx(source), CalibrationSamples(calibration), CalibrateOptions(images=images), quantized)
        seconds[name] = round(time.monotonic() - started, 1)
        rows[name] = sqnr(dense, outputs_of(quantized[FP32], evaluation))
        print(path.name, name, seconds[name], rows[name], flush=True)
    return {
        "file": path.name,
        "sha256": sha256_of(path),
        "weights": done.pruned.weights,
        "by_magnitude": by_magnitude,
        "left_dense": len(done.pruned.left_dense),
        "check": check_2to4(sparse, CheckOptions(strict=True)).verdict,
        "calibration_samples": len(calibration),
        "held_out_samples": len(evaluation),
        "outputs": [spec.name for spec in model.outputs],
        "sqnr_db": rows,
        "squared_error_of_update_over_magnitude": [
            round(10 ** ((a - b) / 10), 4) for a, b in zip(rows["magnitude"], last, strict=True)
        ],
        "seconds": seconds,
    }


def main() -> None:
    """Measure the models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--photos", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--images", type=int, default=256, help="calibration samples (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=64, help="evaluation samples (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".json"), metavar="FILE")
    args = parser.parse_args()
    photos = photographs(args.photos)
    before = os.getloadavg()
    found = []
    with tempfile.TemporaryDirectory(prefix="maskplan-") as folder:
        for path in args.models:
            found.append(measured(path, photos, args.images, args.held_out, Path(folder)))
    head = {
        "command": f"python benchmarks/accuracy/onnx_models.py MODEL.onnx ... --photos DIR --images {args.images}",
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "versions": versions(),
        "photographs": len(photos),
        "load_before": [round(v, 1) for v in before],
        "load_after": [round(v, 1) for v in os.getloadavg()],
    }
    write_json(args.results, head | {"models": found})
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
