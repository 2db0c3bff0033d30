"""Measures seconds and memory of decoding large and long clips, for benchmarks/decode.py, which prints the rows.

The clips are made here: the frames between two keyframes are encoded once and stored repeatedly with later times.
"""

import multiprocessing
import time
from collections.abc import Iterator
from fractions import Fraction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import av
import numpy as np

RATE, HEIGHT, WIDTH, FRAMES, TARGET_RATE = 24, 480, 720, 49, 8
DAMAGED = "damaged_"  # prefix of the names of clips that are
X265 = {"x265-params": "log-level=none:keyint=24:pools=1:frame-threads=1", "preset": "ultrafast"}
X264 = {"g": "48", "bf": "2", "sc_threshold": "0", "preset": "veryfast", "crf": "28"}


def make(
    path: Path, codec: str, pix_fmt: str, size: tuple[int, int], frames: int, repeats: int, **options: str
) -> Path:
    """Writes a clip in which ``frames`` moving pictures of (height, width) are repeated."""
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream(codec, rate=RATE, options=options)
        (stream.height, stream.width), stream.pix_fmt = size, pix_fmt
        stream.codec_context.thread_count = 1
        packets = [packet for number in range(frames) for packet in stream.encode(picture(number, *size))]
        packets += stream.encode()
        stored = [(bytes(packet), packet.pts, packet.dts, packet.is_keyframe) for packet in packets]
        for repeat in range(repeats):
            for data, pts, dts, is_keyframe in stored:
                packet = av.Packet(data)
                packet.pts, packet.dts = pts + repeat * frames, dts + repeat * frames
                packet.is_keyframe, packet.stream, packet.time_base = is_keyframe, stream, Fraction(1, RATE)
                output.mux(packet)
    return path


def picture(number: int, height: int, width: int) -> av.VideoFrame:
    """Returns a picture of moving waves."""
    rows, columns = np.arange(height)[:, None], np.arange(width)[None, :]
    gray = 127 + 120 * np.sin((rows + 3 * number) / 19) * np.cos((columns - 5 * number) / 23)
    return av.VideoFrame.from_ndarray(np.repeat(gray.astype(np.uint8)[..., None], 3, axis=2))


def damaged(path: Path, second: float) -> Path:
    """Writes a copy in which bytes of the packet at a time are overwritten."""
    with av.open(str(path)) as container:
        container.seek(round(second * av.time_base))
        packet = next(packet for packet in container.demux(video=0) if packet.time_base and packet.dts is not None)
    at = (packet.pos or 0) + packet.size // 3
    copy = path.with_name(f"{DAMAGED}{path.name}")
    data = bytearray(path.read_bytes())
    data[at : at + 64] = bytes(byte ^ 0x5A for byte in data[at : at + 64])
    copy.write_bytes(data)
    return copy


def clips(folder: Path) -> Iterator[Path]:
    """Yields the clips one after another. Each is deleted before the next one is made."""
    large = folder / "4k_hevc_10_bit_8_s.mp4"
    yield make(large, "libx265", "yuv420p10le", (2160, 3840), 24, 8, **X265)
    large.unlink()
    for suffix in ("mp4", "ts"):
        long = folder / f"720p_h264_40_min.{suffix}"
        yield make(long, "libx264", "yuv420p", (720, 1280), 48, 1200, **X264)
        yield damaged(long, 1201)
        long.unlink()


def decode_window(path: Path, answer: Connection) -> None:
    """Reads FRAMES frames from the middle at TARGET_RATE, as a preparation does. It runs in a new process."""
    from cogvideox.data.media.faults import VideoError
    from cogvideox.data.media.frames import frame_indices
    from cogvideox.data.media.pixels import decode

    decoded, real = 0, decode._frames

    def counted(*args: Any, **named: Any) -> Iterator[Any]:
        """Counts the frames that the decoder yields."""
        nonlocal decoded
        for frame in real(*args, **named):
            decoded += 1
            yield frame

    decode._frames = counted
    before, started = memory_mib("VmRSS"), time.process_time()
    info = decode.probe(path)
    probed = time.process_time()
    error = ""
    try:
        indices = frame_indices(info.times, FRAMES, TARGET_RATE, "middle")
        decode.read_frames(path, info, indices, HEIGHT, WIDTH)
    except VideoError as raised:
        error = str(raised).split(": ", 1)[1].split(";")[0]
    row: dict[str, Any] = {"clip": path.name, "mib": path.stat().st_size >> 20, "frames": info.num_frames}
    row |= {"probe_s": probed - started, "read_s": time.process_time() - probed, "decoded": decoded}
    row |= {"error": error, "more_memory_mib": memory_mib("VmHWM") - before}
    answer.send(row)


def memory_mib(kind: str) -> int:
    """Returns the memory of this process in MiB: VmRSS is the current value, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith(kind))


def measure(folder: Path) -> list[dict[str, Any]]:
    """Returns a row per clip: CPU seconds for listing packets and reading frames, decoded frames, memory.

    Raises:
        RuntimeError: A clip that is not damaged cannot be read.
        EOFError: The process that read a clip has died.
    """
    context = multiprocessing.get_context("spawn")
    rows = []
    for path in clips(folder):
        ours, theirs = context.Pipe()
        process = context.Process(target=decode_window, args=(path, theirs))
        process.start()
        theirs.close()  # so that recv ends if the process does
        rows.append(ours.recv())
        process.join()
        if rows[-1]["error"] and not path.name.startswith(DAMAGED):
            raise RuntimeError(f"{path.name}: {rows[-1]['error']}")
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Prints a table of the clips with their times and memory."""
    print("clip                             MiB  frames  probe s   read s  decoded  more MiB")
    for row in rows:
        figures = "{mib:6} {frames:7} {probe_s:8.2f} {read_s:8.2f} {decoded:8} {more_memory_mib:9}  {error}"
        print(f"{row['clip']:29} {figures.format(**row)}")
