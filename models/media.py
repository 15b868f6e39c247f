"""Images and recordings: from a file, its bytes or an array to what a model takes, by the processor in its folder."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, UnavailableError
from ..files import sha256
from ..plan import read_json

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""The files in which a processor of images or recordings, or one of several things, is described."""
Array = NDArray[Any]


def digest(value: Any) -> bytes:
    """sha256 of a file's content, of bytes, or of an array."""
    if isinstance(value, dict):
        value = value.get("array")
    if isinstance(value, Path):
        try:
            return bytes.fromhex(sha256(value))
        except OSError as error:
            raise InputError(f"{value} cannot be read: {error.strerror or error}.") from error
    return hashlib.sha256(value if isinstance(value, bytes) else np.ascontiguousarray(value).tobytes()).digest()


def image_preparer(folder: Path, channels: int, shape: tuple[int, ...]) -> Callable[[Any], Array]:
    """The function from an image to float32 ``shape`` [channels, height, width], by the model's own processor."""
    import transformers

    processor = _processor(folder, transformers.AutoImageProcessor, "images")

    def prepare(value: Any) -> Array:
        made = processor(_opened(value, "L" if channels == 1 else "RGB"), return_tensors="np")["pixel_values"][0]
        return _checked(np.asarray(made, dtype=np.float32), shape, value)

    return prepare


def _opened(value: Any, mode: str) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise UnavailableError("Images need pillow: install edgepress[vision].") from error
    if isinstance(value, Image.Image):
        return value.convert(mode)
    try:
        if isinstance(value, (Path, bytes)):
            with Image.open(value if isinstance(value, Path) else io.BytesIO(value)) as image:
                return image.convert(mode)
        array = np.asarray(value)
        if array.dtype != np.uint8:
            raise ValueError(f"it holds {array.dtype}, not bytes from 0 to 255")
        return Image.fromarray(array).convert(mode)
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{_name(value)} cannot be read as an image: {error}.") from error


def pixels(value: Path | bytes, shape: tuple[int, ...]) -> Array:
    """The bytes of an image for a model that takes ``shape``: [height, width] where that has one channel, else
    [height, width, 3]."""
    grey = len(shape) < 3 or 1 in {shape[0], shape[-1]}
    result: Array = np.asarray(_opened(value, "L" if grey else "RGB"))
    return result


def audio_preparer(folder: Path, shape: tuple[int, ...]) -> Callable[[Any], Array]:
    """The function from a recording to float32 ``shape`` [mels, frames], as the model's own extractor does it."""
    import transformers

    extractor = _processor(folder, transformers.AutoFeatureExtractor, "recordings")

    def prepare(value: Any) -> Array:
        samples = samples_of(value, int(extractor.sampling_rate))
        made = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="np")["input_features"][0]
        return _checked(np.asarray(made, dtype=np.float32), shape, value)

    return prepare


def samples_of(value: Any, rate: int) -> NDArray[np.float32]:
    """A recording as one channel of float32 in [-1, 1], resampled to ``rate`` a second.

    An array is at that rate already, unless it comes as ``{"array": …, "sampling_rate": …}``.
    """
    from scipy.signal import resample_poly

    if isinstance(value, (Path, bytes)):
        samples, own_rate = _decoded(value)
    elif isinstance(value, dict):
        samples, own_rate = np.asarray(value.get("array"), dtype=np.float32), int(value.get("sampling_rate", rate))
    else:
        samples, own_rate = np.asarray(value, dtype=np.float32), rate
    mono = samples.mean(axis=1) if samples.ndim > 1 else samples
    common = int(np.gcd(rate, own_rate))
    mono = mono if own_rate == rate else resample_poly(mono, rate // common, own_rate // common)
    return np.asarray(mono, dtype=np.float32)


def _decoded(value: Path | bytes) -> tuple[Array, int]:
    stream: Any = value if isinstance(value, Path) else io.BytesIO(value)
    try:
        import soundfile
    except ImportError:
        return _wav(stream, value)
    try:
        samples, rate = soundfile.read(stream, dtype="float32")
    except (soundfile.SoundFileError, OSError) as error:
        raise InputError(f"{_name(value)} cannot be read as a recording: {error}.") from error
    return samples, int(rate)


def _wav(stream: Any, value: Path | bytes) -> tuple[Array, int]:
    from scipy.io import wavfile

    if isinstance(value, Path) and value.suffix.lower() != ".wav":
        raise UnavailableError("Recordings other than .wav need soundfile: install edgepress[audio].")
    try:
        rate, samples = wavfile.read(stream)
    except (ValueError, OSError) as error:
        raise InputError(f"{_name(value)} cannot be read as a recording: {error}.") from error
    if np.issubdtype(samples.dtype, np.integer):
        middle = 128 if samples.dtype == np.uint8 else 0  # eight bits have no sign in a .wav file
        samples = (samples.astype(np.float32) - middle) / (np.iinfo(samples.dtype).max + 1 - middle)
    return np.asarray(samples, dtype=np.float32), int(rate)


def _processor(folder: Path, kind: Any, what: str) -> Any:
    """The processor that ``folder`` describes; nothing is downloaded and no code from the folder is run."""
    described = [folder / name for name in PROCESSORS if (folder / name).is_file()]
    if not described:
        raise InputError(f"{folder} has no {PROCESSORS[0]}, which says how {what} are made ready for the model.")
    asking = next((path for path in described if "auto_map" in json.dumps(read_json(path))), None)
    if asking:
        raise InputError(f"{asking} asks for code of its own (auto_map), which edgepress does not run.")
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ImportError as error:
        raise UnavailableError("Images need pillow: install edgepress[vision].") from error
    except Exception as error:  # the library raises what its parts raise
        raise InputError(f"The processor in {folder} cannot be loaded: {str(error).splitlines()[0]}") from error


def _checked(array: Array, shape: tuple[int, ...], value: Any) -> Array:
    if array.shape != shape:
        raise InputError(f"{_name(value)} becomes {list(array.shape)}, and the model takes {list(shape)}.")
    return array


def _name(value: Any) -> str:
    return str(value) if isinstance(value, Path) else "An element of the rows"
