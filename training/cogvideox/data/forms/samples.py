"""Reads data set folders into a list of samples, and reports all errors of all folders at once.

``read_samples`` and ``read_validation`` return the clips. ``check_data_roots`` reads them to check the flags, and keeps
them for the run, which gets them from ``take_listing``. This module assigns ids and adds the id token to captions. It
relies on folders.py for the form of a folder and on paths.py for which files may be named. No video is opened.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cogvideox.config.flags import TENSOR_INDEX, DataFlags
from cogvideox.config.options import SampleOptions, needs_captions, reads_clips, tensor_folder
from cogvideox.data.forms.columns import NO_CAPTION, WITHOUT_CAPTIONS, Column, Columns, Problems, is_unicode
from cogvideox.data.forms.folders import read_columns
from cogvideox.data.forms.paths import PathRules
from cogvideox.data.forms.unused import Unused
from cogvideox.data.media.frames import Section
from cogvideox.errors import UsageError
from cogvideox.files import stamp_of

LISTING_ATTRIBUTE = "_listing"  # the attribute of DataFlags in which check_data_roots leaves it


@dataclass(frozen=True)
class Sample:
    """Describes one training clip.

    Attributes:
        id: The path as listed, relative to its data root, with forward slashes. "#2", "#3" and so on are added for
            later rows with the same path.
        caption: The caption with the id token in front; empty where it is missing and not needed.
        video: Absolute path of the video, with symlinks not followed.
        image: Absolute path of the first frame, if the data set names one.
        section: The part of the video that the clip is; None for the whole video.
        no_image: Location ("file:line") of the missing image, if other clips have one and this one does not.
        caption_file: The list or table that has the caption, or would have it; empty if that is a text file next to the
            clip.
    """

    id: str
    caption: str
    video: str
    image: str | None = None
    section: Section | None = None
    no_image: str = ""
    caption_file: str = field(default="", compare=False)

    @property
    def clip(self) -> tuple[str, Section | None]:
        """What is read: the path of the video, and its section."""
        return self.video, self.section


@dataclass(frozen=True)
class Listing:
    """Holds what was found in the folders of a data set.

    Attributes:
        samples: The clips to train on, in order.
        validation: The clips to measure the loss on, in order.
        unused: Files that are not used, although somebody may have meant them to be.
        index: Size and time of the index of the tensors before anything was listed. An index with others is from a
            process that may have listed more clips.
    """

    samples: list[Sample]
    validation: list[Sample]
    unused: Unused
    index: list[int]


def read_samples(data: DataFlags, unused: Unused | None = None, need_captions: bool = True) -> list[Sample]:
    """Reads the clips of every --data_root in order, each folder's as often as --repeats says.

    A repeated folder has the same effect as its rows listed again. Ids are unique, also where two folders have the same
    path.

    Args:
        data: The flags.
        unused: Collects files that are not used, although somebody may have meant them to be.
        need_captions: Whether a missing caption is an error; otherwise it is empty.

    Raises:
        UsageError: Everything that is wrong with the folders, their lists or tables, the captions and the paths.
    """
    found = Unused() if unused is None else unused
    return _read_folders("--data_root", data.data_root, data.repeats, data, found, need_captions)


def read_validation(data: DataFlags, unused: Unused | None = None, need_captions: bool = True) -> list[Sample]:
    """Reads the clips of --validation_data_root, once each; without the flag there are none.

    The arguments and errors are those of ``read_samples``.
    """
    found = Unused() if unused is None else unused
    return _read_folders("--validation_data_root", data.validation_data_root, (1,), data, found, need_captions)


def check_no_missing_images(samples: Sequence[Sample]) -> None:
    """Raises UsageError if some clips of a data set have an image and others do not; used for image-to-video."""
    problems = Problems()
    for location in dict.fromkeys(sample.no_image for sample in samples if sample.no_image):
        fix = "write one, or leave the images of all rows blank: then each clip's own first frame is taken"
        problems.add("blank image", f"{location}: blank path of the image; {fix}")
    if problems:
        raise UsageError(problems.lines())


def check_data_roots(options: SampleOptions) -> Iterator[str]:
    """Yields the problems of --data_root and --validation_data_root, for args.parse.

    The clips are kept for ``take_listing``, so that folders are read only once.
    """
    if not reads_clips(options):
        return
    listing, problems = _list_clips(options.data, tensor_folder(options), needs_captions(options))
    vars(options.data)[LISTING_ATTRIBUTE] = listing  # incomplete if there are problems, but then the run ends
    yield from problems


def take_listing(data: DataFlags, folder: Path, need_captions: bool = True) -> Listing:
    """Returns the clips of all folders, as ``check_data_roots`` read them, or else reads them.

    The clips that were kept belong to the flags object and not to its values: another run with equal flags in the same
    process reads its folders again. They can be taken once.

    Args:
        data: The flags.
        folder: Where the clips are prepared.
        need_captions: Whether a missing caption is an error.

    Raises:
        UsageError: As for ``read_samples``.
    """
    kept: Listing | None = vars(data).pop(LISTING_ATTRIBUTE, None)
    if kept is not None:
        return kept
    listing, problems = _list_clips(data, folder, need_captions)
    if problems:
        raise UsageError(problems)
    return listing


def _list_clips(data: DataFlags, folder: Path, need_captions: bool) -> tuple[Listing, list[str]]:
    """Returns the clips of all folders and the problems of those that are left out."""
    listing = Listing([], [], Unused(), stamp_of(folder / TENSOR_INDEX))
    problems: list[str] = []
    for clips, read in ((listing.samples, read_samples), (listing.validation, read_validation)):
        try:
            clips.extend(read(data, listing.unused, need_captions))
        except UsageError as error:
            problems.extend(error.problems)
    return listing, problems


def _read_folders(
    flag: str,
    folders: Sequence[str],
    repeats: Sequence[int],
    data: DataFlags,
    unused: Unused,
    need_captions: bool,
) -> list[Sample]:
    """Reads the clips of folders as often as ``repeats`` says, and raises the problems of all folders together."""
    # A single number applies to all folders. The check of the flags reports a wrong count.
    times = repeats if len(repeats) == len(folders) else [repeats[0]] * len(folders)
    uses: dict[str, int] = {}
    samples: list[Sample] = []
    found: list[str] = []
    for folder, repeat in zip(folders, times, strict=True):
        problems = Problems(need_captions)
        clips = _read_folder(flag, folder, data, problems, unused)
        found += problems.lines()
        for _ in range(0 if found else repeat):
            samples += [_with_unique_id(clip, uses) for clip in clips]
    if found:
        raise UsageError(found)
    return samples


def _read_folder(flag: str, folder: str, data: DataFlags, problems: Problems, unused: Unused) -> list[Sample]:
    """Reads the clips of a folder, with ids that may not be unique; with problems the result must not be used."""
    root = os.path.abspath(folder)
    if not os.path.isdir(root):
        kind = "not a folder" if os.path.lexists(root) else "no such folder"
        problems.add("no folder", f"{flag} {folder}: {kind}; give the folder of the clips and captions")
        return []
    rules = PathRules(root, data.allow_path)
    columns = read_columns(root, data, rules, problems)
    if columns.captions is None and columns.videos is not None and not problems:  # captions are not needed
        columns = replace(columns, captions=replace(columns.videos, values=[""] * len(columns.videos.values)))
    if columns.captions is not None:
        _check_captions(columns.captions, columns, problems)
    images = _with_gaps(columns.images, asked=data.image_column is not None)
    videos = rules.find(columns.videos, "video", problems) if columns.videos is not None else []
    first_frames = rules.find(images, "image", problems) if images is not None else []
    if problems:
        return []
    unused.add(columns, videos, rules)
    return list(_clips(root, replace(columns, images=images), videos, first_frames, (data.id_token or "").strip()))


def _with_gaps(images: Column | None, asked: bool) -> Column | None:
    """Returns a column of images with None for blank ones, or None for a column that is blank and was not asked for."""
    if images is None or not (asked or any(images.values)):
        return None
    return replace(images, values=[value or None for value in images.values])


def _check_captions(captions: Column, columns: Columns, problems: Problems) -> None:
    for row, caption in enumerate(captions.values):
        if caption is None:
            continue
        if not caption:
            fix = f"write one, or {captions.removal}"
            if columns.caption_file and _has_text_next_to_it(columns, row):
                fix = (
                    "copy it from the text file next to the clip, which is not read because this file has the captions"
                )
            problems.add(NO_CAPTION, f"{captions.location(row)}: blank caption; {fix}; {WITHOUT_CAPTIONS}")
        elif "\0" in caption:
            rule = "holds a NUL byte; save the file as plain UTF-8 text"
            problems.add("NUL in caption", f"{captions.location(row)}: {rule}")
        elif not is_unicode(caption):
            rule = "holds half of a surrogate pair; write the character itself, in UTF-8"
            problems.add("half a character", f"{captions.location(row)}: {rule}")


def _has_text_next_to_it(columns: Columns, row: int) -> bool:
    """Returns whether the clip of a row has a text file of its own next to it, which is not empty."""
    videos = columns.videos
    path = videos.values[row] if videos is not None and row < len(videos.values) else None
    if videos is None or not path or "\0" in path:
        return False
    if columns.sections is not None and row < len(columns.sections) and columns.sections[row] is not None:
        return False  # the text is about all sections of the file
    text = f"{os.path.splitext(os.path.join(videos.folder, path))[0]}.txt"
    return os.path.isfile(text) and os.path.getsize(text) > 0


def _clips(
    root: str, columns: Columns, files: Sequence[str | None], images: Sequence[str | None], token: str
) -> Iterator[Sample]:
    """Yields the samples of columns without problems.

    Args:
        root: Absolute path of the folder.
        columns: Captions, videos and images as listed.
        files: Absolute path of each video.
        images: Absolute path of each image, or None.
        token: The id token, which is put in front of captions.
    """
    captions, videos = columns.captions, columns.videos
    assert captions is not None
    assert videos is not None
    inside = os.path.join(root, "")
    for row, (caption, path, file) in enumerate(zip(captions.texts(), videos.texts(), files, strict=True)):
        assert file is not None
        # A path outside the folder, which --allow_path allows, keeps its absolute form as its id.
        listed = os.path.join(videos.folder, path)
        # If the file was found under another spelling, backslashes in the list are separators of Windows.
        if file != listed:
            listed = listed.replace("\\", "/")
        name = os.path.normpath(listed).removeprefix(inside).replace(os.sep, "/")
        image = images[row] if columns.images is not None else None
        gap = columns.images.location(row) if columns.images is not None and image is None else ""
        section = columns.sections[row] if columns.sections is not None else None
        # The path of the file is not normalized: "link/../a.mp4" is next to the folder that the link leads to.
        yield Sample(name, _with_token(token, caption), file, image, section, gap, columns.caption_file)


def _with_unique_id(clip: Sample, uses: dict[str, int]) -> Sample:
    sample_id = unique_id(clip.id, uses)
    return clip if sample_id == clip.id else replace(clip, id=sample_id)


def unique_id(name: str, uses: dict[str, int]) -> str:
    """Returns the name, or name#2, name#3 and so on if it is taken.

    Args:
        name: The wanted id.
        uses: Counts the uses of each id, and is updated.
    """
    number = uses.get(name, 0) + 1
    while number > 1 and f"{name}#{number}" in uses:  # a file may itself be called "a.mp4#2"
        number += 1
    uses[name] = number
    sample_id = name if number == 1 else f"{name}#{number}"
    uses.setdefault(sample_id, 1)
    return sample_id


def _with_token(token: str, caption: str) -> str:
    # "DOG" is already in front of "DOG, running", but not of "DOGS running".
    present = caption.startswith(token) and not caption[len(token) : len(token) + 1].isalnum()
    return caption if not token or not caption or present else f"{token} {caption}"
