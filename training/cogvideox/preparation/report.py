"""Reports what a preparation does with a data set: a table of buckets, notes, odd clips, and what encoding costs.

``prepare_and_report`` prepares a data set, publishes its index, and prints the report. ``describe`` returns the report,
from the records of the ledger, and writes the page about the data set; ``suggest`` prints buckets that suit the clips.
"""

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from cogvideox.config.buckets import Bucket
from cogvideox.config.geometry import Geometry
from cogvideox.data.cache import CacheIndex, open_index, publishing
from cogvideox.data.clips import time_decode
from cogvideox.data.forms.samples import Sample
from cogvideox.data.media.colors.sdr import HDR, WHITE, is_wide_sdr
from cogvideox.data.media.frames import Section, overlap
from cogvideox.data.records import SHORT, SMALL
from cogvideox.data.used import BUCKET_COLUMNS, Records, Used, bucket_rows, by_bucket
from cogvideox.errors import UsageError, plural
from cogvideox.model import encode, models
from cogvideox.preparation.captions import caption_notes, clips_by_caption, indented, shared_notes
from cogvideox.preparation.causes import cause_lines, flags_of, proposal_line, proposal_of
from cogvideox.preparation.data_page import DataPage
from cogvideox.preparation.encoding import Encoders, VaeInput, missing_captions
from cogvideox.preparation.misread import misread_notes
from cogvideox.preparation.prepare import Preparation, num_decoders
from cogvideox.preparation.proposals import USUAL
from cogvideox.preparation.unusable import UnusableClips, allowing, too_many_bad, unused_notes

TRIED = 3  # clips to time
LEAST_SHARE = 0.1  # of a clip; a note says so if less is trained on
LARGE = 720  # pixels of the shorter side, from which on players assume bt709 where a file does not say
# FFmpeg's filters that name bt709 in a file without encoding it again, by codec.
TAG_FILTERS = {
    "h264": "h264_metadata=matrix_coefficients=1",
    "hevc": "hevc_metadata=matrix_coefficients=1",
    "vp9": "vp9_metadata=color_space=bt709",
}
TIMED_FRAMES = 9  # the VAE encodes 8 at a time, and the first one apart


def prepare_and_report(preparation: Preparation, say: Callable[[str], None], caption_batch: int = 1) -> CacheIndex:
    """Encodes what is missing, then publishes the index, the page and the pictures, and prints the report.

    Another process may have listed the clips later and found more, but it may be done earlier. So no process replaces
    an index that another one has published since it listed the clips. It lists them again, and prepares what it did not
    know of; usually the other process has encoded that already.

    Args:
        preparation: The preparation.
        say: Prints a line on the main rank.
        caption_batch: Captions per forward pass of T5.

    Returns:
        The index that was published.

    Raises:
        UsageError: Too many clips cannot be used, or the data set is no longer valid when it is listed again.
    """
    while True:
        with preparation.workers_kept():
            records = preparation.plan()
            with failures_explained(preparation, say):
                preparation.check(records)
                index, records = preparation.encode(records, caption_batch)
            with publishing(preparation.folder, say):
                published = preparation.publish(index)
                report = describe(preparation, records) if published else ""
        if all(preparation.ranks.gather([published])):
            say(report)
            return index
        if line := other_flags(preparation, index):
            say(line)
        preparation = preparation.again()


def other_flags(preparation: Preparation, index: CacheIndex) -> str:
    """Returns a message if another process has prepared the folder with other flags, else an empty text.

    Args:
        preparation: The preparation of this process.
        index: Its index, which will replace the one that the other process has published.
    """
    there, here = open_index(preparation.folder).recipe, index.recipe
    differ = [f"--{name} {there.get(name)} there, {here[name]} here" for name in here if there.get(name) != here[name]]
    rule = "another process has meanwhile prepared it with other flags, and this one replaces its index"
    fix = "give all processes the same flags"
    return f"{preparation.folder}: {rule}: {'; '.join(differ)}; {fix}" if differ else ""


def describe(preparation: Preparation, records: Records, costs: bool = False) -> str:
    """Returns the report of a preparation and writes its page; returns an empty text except on the main rank.

    Args:
        preparation: The preparation.
        records: The record of every sample.
        costs: Whether to add what encoding will cost and what to do next, for a dry run.
    """
    if not preparation.ranks.is_main_process:
        return ""
    used = by_bucket(records)
    notes = notes_on(preparation, records, used)
    page = DataPage(preparation, records, used)
    sheets = page.draw()
    costs_of = cost(preparation, records).splitlines() if costs else []
    path = page.write(rows_of(preparation, used), sheets, notes, costs_of)
    lines = [*outcome(preparation, records, used), *notes, *page.odd_lines()]
    lines += [f"picture: {sheet}" for sheet in sheets.values()]
    lines += [f"report: {path}", *costs_of]
    if costs:
        lines += next_steps(preparation, records) or ["next: the same command without --dry_run encodes this"]
    return "\n".join(lines)


@contextmanager
def failures_explained(preparation: Preparation, say: Callable[[str], None]) -> Iterator[None]:
    """Prints the table of clips, the causes and what helps, if the block ends because too many clips are unusable."""
    try:
        yield
    except UnusableClips as error:
        lines = outcome(preparation, error.records, by_bucket(error.records))
        say("\n".join([*lines, *next_steps(preparation, error.records)]))
        raise


def next_steps(preparation: Preparation, records: Records) -> list[str]:
    """Returns lines that say what to do before encoding: write captions, use other buckets, or allow bad clips."""
    missing = [sample.caption_file for sample in preparation.samples if not sample.caption]
    good = sum(record.usable for record in records)
    steps = []
    if missing:
        text_file = "a file of the clip's name that ends in .txt, next to it, or into a table (docs/data.md)"
        where = " or ".join(f"its row of {file}" if file else text_file for file in dict.fromkeys(missing))
        have = plural(len(records), "clip has", "clips have")
        rule = f"{len(missing)} of {have} none; each goes into {where}"
        steps.append(f"write the captions, or let caption_dataset.py write them: {rule}")
    if any(record.status in (SHORT, SMALL) for record in records):
        proposal = proposal_of(records, preparation.data, preparation.geometry, USUAL)
        if proposal.fitting > good:
            steps.append(f"other buckets: {proposal_line(proposal, preparation.data)}")
    bad = too_many_bad(records, preparation.data.max_bad_fraction)
    if bad and good:
        unused = plural(bad, "clip that is", "clips that are")
        steps.append(f"fix or remove the {unused} not used, or continue without: {allowing(records)}")
    return [f"next: {step}" for step in steps]


def suggest(preparation: Preparation, number: int) -> None:
    """Prints suitable buckets as flags to standard output, and how many clips fit them to standard error.

    Args:
        preparation: The preparation.
        number: The largest number of buckets to suggest.

    Raises:
        UsageError: No clip fits any bucket of this model.
    """
    if not preparation.ranks.is_main_process:
        return
    records = preparation.measure()
    for line in cause_lines(records, preparation.data, preparation.geometry):
        print(line, file=sys.stderr)
    proposal = proposal_of(records, preparation.data, preparation.geometry, number)
    if not proposal.buckets:
        rule = f"none of {plural(len(records), 'clip')} fills a bucket that this model takes"
        raise UsageError(f"--suggest_buckets {number}: {rule}; give a larger --max_upscale, or longer clips")
    fitting = f"{proposal.fitting} of {plural(proposal.num_clips, 'clip fits', 'clips fit')} these buckets"
    print(f"{fitting}; give this to prepare_dataset.py:", file=sys.stderr)
    print(flags_of(proposal, preparation.data), flush=True)


def stored_bytes(preparation: Preparation) -> int:
    """Returns the bytes per element of the stored moments; 2 if the weights are not available."""
    try:
        return models.DTYPES[preparation.encoders.vae_dtype].itemsize
    except UsageError:
        return 2


# -- the table ---------------------------------------------------------------------------------------------------------


def outcome(preparation: Preparation, records: Records, used: dict[Bucket, list[Used]]) -> list[str]:
    """Returns the table of buckets, the number of clips that are used, and why the others are not, by cause."""
    lines = aligned([BUCKET_COLUMNS, *rows_of(preparation, used)])
    good = sum(record.usable for record in records)
    line = f"{good} of {plural(len(records), 'clip is', 'clips are')} used"
    lines.append(line + (", and these are not:" if good < len(records) else ""))
    return [*lines, *cause_lines(records, preparation.data, preparation.geometry)]


def rows_of(preparation: Preparation, used: dict[Bucket, list[Used]]) -> list[tuple[str, ...]]:
    """Returns the rows of the table of buckets."""
    return bucket_rows(used, preparation.geometry, stored_bytes(preparation), preparation.image_variants)


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Returns a line for each row of a table, with cells of equal width in a column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


# -- notes -------------------------------------------------------------------------------------------------------------


def notes_on(preparation: Preparation, records: Records, used: dict[Bucket, list[Used]]) -> list[str]:
    """Returns lines about a data set that its user may not expect; details of a line follow it and are indented."""
    geometry, number = preparation.geometry, len(records) - preparation.num_validation
    notes = [*frame_notes(used, geometry), *still_notes(used), *color_notes(records)]
    notes += length_notes(used, records, preparation.recipe.fps)
    if preparation.num_validation:
        notes.append(f"{plural(preparation.num_validation, 'clip is', 'clips are')} for validation")
    notes += unused_notes(preparation.unused)
    notes += leak_notes(preparation, records)
    notes += rate_notes(used, preparation.recipe.fps)
    tokenizer, clips = models.load_tokenizer(preparation.model), used_clips(preparation.samples, records)
    notes += [*misread_notes(clips_by_caption(clips)), *caption_notes(tokenizer, clips, geometry.max_text_seq_length)]
    return notes + shared_notes(used_clips(preparation.samples[:number], records[:number]))


def frame_notes(used: dict[Bucket, list[Used]], geometry: Geometry) -> Iterator[str]:
    """Yields a note for each frame count of which inference makes a different number of frames."""
    for frames in sorted({bucket.frames for bucket in used}):
        made = geometry.inference_frames(frames)
        if made != frames or frames % geometry.temporal_compression == 0:
            latents = geometry.latent_frames(frames)
            yield f"{frames} frames are {latents} latent frames, of which inference makes {made} frames"


def still_notes(used: dict[Bucket, list[Used]]) -> Iterator[str]:
    """Yields a note for each bucket in which videos contribute only one frame."""
    for bucket, clips in used.items():
        videos = sum(clip.source.frames > 1 for clip in clips)
        if bucket.frames == 1 and videos:
            given = plural(videos, "video gives one frame", "videos give one frame each")
            yield f"{bucket}: {given}; to train on motion give longer buckets too"


def length_notes(used: dict[Bucket, list[Used]], records: Records, fps: float | None) -> Iterator[str]:
    """Yields a note about clips of which all variants together are only a small part.

    Args:
        used: The usable clips.
        records: The record of every sample.
        fps: The rate at which clips are sampled; None if their frames are spread over all of the clip.
    """
    shares: dict[int, float] = {}
    for bucket, clips in used.items():
        for clip in clips if fps and bucket.frames > 1 else ():
            frames = bucket.frames * clip.num_variants
            shares[clip.place] = shares.get(clip.place, 0.0) + frames / (records[clip.place].available or frames)
    long = sum(share < LEAST_SHARE for share in shares.values())
    if fps and long:
        # A longer scene is divided into equal parts, so each has at least half as many seconds.
        seconds = math.ceil(2 * max(bucket.frames for bucket in used) / fps)
        rule = f"much longer than what is trained on, which is less than {LEAST_SHARE:.0%} of the clip"
        fix = f"split_scenes.py --max_scene_seconds {seconds} makes several clips of one"
        yield f"{plural(long, 'clip is', 'clips are')} {rule}; {fix}"


def color_notes(records: Records) -> Iterator[str]:
    """Yields notes about clips whose colors are converted, and about large clips whose color matrix is not tagged."""
    sources = [record.probed for record in records if record.usable]
    found = Counter(name for source in sources for name in source.conversions)
    hdr = {name: found[name] for name in HDR.values() if found[name]}
    if hdr:
        kinds = ", ".join(f"{count} {name.upper()}" for name, count in hdr.items())
        done = f"converted to SDR with {WHITE:g} cd/m2 as white; brighter parts are clipped"
        yield f"{plural(sum(hdr.values()), 'clip is', 'clips are')} HDR ({kinds}): {done}"
    wide = sum(is_wide_sdr(source.conversions) for source in sources)
    if wide:
        yield f"{plural(wide, 'clip is', 'clips are')} SDR with colors of bt2020 or P3: converted to bt709"
    untagged = [source for source in sources if source.matrix_is_assumed]
    large = [source.codec for source in untagged if min(source.height, source.width) >= LARGE]
    if large:
        number = plural(len(large), "clip is", "clips are")
        rule = f"{number} of {LARGE}p or more without a color matrix: bt601 is assumed, as by decord"
        commands = " or ".join(map(tag_command, sorted(set(large))))
        yield f"{rule}; if a player shows other colors, it assumes bt709, so name that: {commands}"


def tag_command(codec: str) -> str:
    """Returns the command that names bt709 in a file of a codec."""
    how = "-vf setparams=colorspace=bt709 OUT.mp4"  # other containers, such as avi, do not store the matrix
    if codec in TAG_FILTERS:
        how = f"-c copy -bsf:v {TAG_FILTERS[codec]} OUT"
    return f"`ffmpeg -i IN {how}` ({codec})"


def leak_notes(preparation: Preparation, records: Records) -> list[str]:
    """Returns lines about clips that are both held out and trained on, as far as parts of videos overlap."""
    number = len(records) - preparation.num_validation
    trained: dict[str, set[Section | None]] = {}
    for sample, content in used_clips(preparation.samples[:number], records[:number]):
        trained.setdefault(content, set()).add(sample.section)
    leaked = [
        sample.video
        for sample, content in used_clips(preparation.samples[number:], records[number:])
        if any(overlap(sample.section, section) for section in trained.get(content, ()))
    ]
    if not leaked:
        return []
    clips = plural(len(leaked), "clip is", "clips are")
    return [
        f"--validation_data_root: {clips} trained on too, so the loss is not a held-out loss:",
        *indented(leaked),
    ]


def rate_notes(used: dict[Bucket, list[Used]], fps: float | None) -> Iterator[str]:
    """Yields a note about clips with a lower frame rate than they are sampled at, so that frames are repeated."""
    clips = {clip.place: clip for clips in used.values() for clip in clips if fps and clip.repeats_frames}
    rates = [clip.source.fps for clip in clips.values() if fps and clip.source.fps < fps]
    if not rates:
        return
    slowest = math.floor(min(rates) * 100) / 100
    own = f"{slowest:g}" if slowest == max(rates) else f"{slowest:g} to {max(rates):g}"
    yield (
        f"{plural(len(rates), 'clip has', 'clips have')} only {own} frames per second, and clips are sampled at "
        f"{fps:g}, so some frames are repeated; --fps {slowest:g} repeats none, or leave out clips with a lower rate"
    )


def used_clips(samples: Sequence[Sample], records: Records) -> list[tuple[Sample, str]]:
    """Returns the samples that are used, each with the hash of the content of its file."""
    pairs = zip(samples, records, strict=True)
    return [(sample, record.content) for sample, record in pairs if record.usable]


# -- costs -------------------------------------------------------------------------------------------------------------


def left_to_encode(
    preparation: Preparation, records: Records, encoders: Encoders
) -> tuple[list[VaeInput], list[str], int]:
    """Returns the clips and captions whose tensors are not in the cache, and the bytes of these tensors."""
    cache, geometry = preparation.cache, preparation.geometry
    todo = [clip for key, clip in preparation.vae_inputs(records, encoders).items() if not cache.has(key)]
    captions = missing_captions(cache, encoders, preparation.captions(records))
    size = sum(math.prod(clip.shape(geometry)) for clip in todo) * models.DTYPES[encoders.vae_dtype].itemsize
    embedding = geometry.max_text_seq_length * geometry.text_embed_dim
    return todo, captions, size + len(captions) * embedding * models.DTYPES[encoders.text_dtype].itemsize


def cost(preparation: Preparation, records: Records) -> str:
    """Estimates what is left to encode, in bytes and hours. For the hours, the VAE encodes a few frames of one clip."""
    try:
        encoders = preparation.encoders
    except UsageError as error:
        return f"hours are not known: {error}"
    todo, captions, size = left_to_encode(preparation, records, encoders)
    images = sum(bool(clip.draws) for clip in todo)
    each = f"{plural(preparation.image_variants, 'time')} each"
    frames = f", {plural(images, 'first frame')} {each}" if images else ""
    counts = f"{plural(len(todo) - images, 'variant')} of clips{frames} and {plural(len(captions), 'caption')}"
    line = f"to encode: {counts}, {size / 2**20:.1f} MiB"
    if not todo:
        return line
    if note := preparation.precision_note():
        line = f"{note}\n{line}"
    rate = seconds_a_pixel(preparation, encoders, sorted(todo, key=lambda clip: clip.pixels)[-TRIED:])
    if rate is None:
        return f"{line}; hours are not known: the longest clips do not decode"
    seconds = rate * sum(clip.pixels for clip in todo)
    return f"{line}; the clips take about {duration(seconds)} on one {device_name(preparation.ranks.device)}"


def seconds_a_pixel(preparation: Preparation, encoders: Encoders, clips: Sequence[VaeInput]) -> float | None:
    """Measures the seconds to encode one pixel, or to decode it if that is slower, on a few frames of one clip.

    Args:
        preparation: The preparation.
        encoders: The VAE and its precision.
        clips: Clips to try; the last one that decodes is used.

    Returns:
        Seconds per pixel; None if no clip decodes.
    """
    variants = ((clip, replace(clip.variant, indices=clip.variant.indices[:TIMED_FRAMES])) for clip in clips)
    jobs = ((clip, (time_decode, clip.path, variant)) for clip, variant in variants)
    timed = [result for _, result in preparation.in_workers(jobs, len(clips), "timing") if isinstance(result, tuple)]
    if not timed:
        return None
    decode_seconds, frames = timed[-1]
    device = preparation.ranks.device
    with models.video_encoder(preparation.model, encoders.vae_dtype, device, encoders.tiling) as vae:
        for _ in range(2):  # the first time also chooses kernels
            start = time.perf_counter()
            encode.video_moments(vae, frames).cpu()  # ends on the CPU, so the device is done
            seconds = time.perf_counter() - start
    return max(seconds, decode_seconds / num_decoders(preparation.data, preparation.limits)) / frames[..., 0].size


def duration(seconds: float) -> str:
    """Returns a duration in a readable unit: 14 s, 3.2 min, 2.4 hours."""
    for size, unit in ((3600, "hours"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def device_name(device: torch.device) -> str:
    """Returns the name of a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
