"""Reads a data set folder in any of its forms into columns of captions, videos and images.

    lists      prompts.txt (or prompt.txt) and videos.txt, and images.txt: line n of each file describes one clip
    table      CSV, TSV, JSON lines or JSON with one row for each clip: --dataset_file, metadata.csv or metadata.jsonl
    pairs      clip.mp4 next to clip.txt, which holds its caption, in any folder below the root; also videos/clip.mp4
               with labels/clip.txt, as CogVideo's own trainer stores them

``read_columns`` is the entry point; it chooses the form. A file that names the clips takes precedence over pairs. If
there are two such files, the user must choose with a flag. If there are neither captions nor such a file in the root, a
single metadata.csv or metadata.jsonl below it is read as if --dataset_file named it.
"""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from shlex import quote

from cogvideox.config.flags import CAPTION_FILES, IMAGE_FILES, TENSOR_FOLDER, VIDEO_FILES, FolderFlags
from cogvideox.data.forms.columns import (
    CAPTION_ELSEWHERE,
    NO_CAPTION,
    NO_CAPTIONS,
    WITHOUT_CAPTIONS,
    Column,
    Columns,
    Problems,
    read_lines,
)
from cogvideox.data.forms.paths import (
    MEDIA_SUFFIXES,
    PathRules,
    by_name,
    fold_name,
    is_image,
    is_listed,
)
from cogvideox.data.forms.tables import TABLE_READERS, Names, read_table
from cogvideox.data.forms.unused import Unused
from cogvideox.errors import first_names

TABLE_FILES = ("metadata.csv", "metadata.jsonl")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")  # without .json: most such files are no tables
# Files that are neither clips nor captions, and that nobody could mistake for one. All others are reported as skipped.
TEXT_SUFFIXES = (
    "", ".md", ".rst", ".json", ".jsonl", ".csv", ".tsv", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".xml", ".html",
    ".log", ".srt", ".vtt", ".ass", ".nfo", ".url", ".sh", ".py", ".bat", ".pdf", ".sha256", ".md5", ".pt",
    ".safetensors", ".npy", ".npz", ".parquet", ".part", ".tmp", ".lrv", ".thm", ".aae", ".xmp",
)  # fmt: skip
# First words in the names of text files that are about the data set and are not captions.
DOCUMENTS = {
    "readme", "license", "licence", "copying", "copyright", "notice", "changelog", "changes", "authors", "credits",
    "citation", "attribution", "contributing", "requirements", "todo", "terms",
}  # fmt: skip
NO_NAMES: Names = (None, None, None)
PREVIEW_FOLDER = "preview"  # in the output folder of a preparation: pictures of its clips
# A folder with all files of one of these groups was written by this suite, and is not searched for clips.
LEDGER_NAME = "ledger.jsonl"  # in the output folder of a preparation: what is known about each file
OUTPUTS = ((LEDGER_NAME,), ("config.json", "metrics.jsonl"))


def read_rows(folder: str, data: FolderFlags, problems: Problems, unused: Unused) -> tuple[Columns, list[str]]:
    """Reads a folder whose captions may be missing, and finds its videos.

    Args:
        folder: The folder as given.
        data: Flags that say how it is read.
        problems: Collects everything that is wrong.
        unused: Collects files that are not used, although somebody may have meant them to be.

    Returns:
        The columns, and the absolute path of the video of each row, with symlinks not followed. Without videos if
        there are problems.
    """
    root = os.path.abspath(folder)
    if not os.path.isdir(root):
        kind = "not a folder" if os.path.lexists(root) else "no such folder"
        problems.add("no folder", f"{folder}: {kind}; give the folder of the clips")
        return Columns(), []
    rules = PathRules(root, data.allow_path)
    columns = read_columns(root, data, rules, problems)
    files = rules.find(columns.videos, "video", problems) if columns.videos is not None else []
    if problems:
        return columns, []
    unused.add(columns, files, rules)
    return columns, [file for file in files if file is not None]


def read_columns(root: str, data: FolderFlags, rules: PathRules, problems: Problems) -> Columns:
    """Reads the rows of a folder in whichever form it has.

    Args:
        root: Absolute path of the folder.
        data: Flags that may name a table, lists or columns.
        rules: Decide which files may be read.
        problems: Collects everything that is wrong.

    Returns:
        The columns. One that could not be read is None, and the reason is among the problems.
    """
    names = (data.caption_column, data.video_column, data.image_column)
    if data.dataset_file is not None:
        alone = len(data.data_root) + len(data.validation_data_root) == 1
        file = _find_table(root, data.dataset_file, alone, problems)
        return _read_table(root, file, names, rules, problems) if file is not None else Columns()
    if names != NO_NAMES:
        return _read_lists(root, names, rules, problems)
    return _detect_form(root, rules, problems)


def _read_table(root: str, file: str, names: Names, rules: PathRules, problems: Problems) -> Columns:
    return read_table(file, root, names, problems) if _may_read(root, file, rules, problems) else Columns()


def _may_read(root: str, file: str, rules: PathRules, problems: Problems) -> bool:
    """Returns whether a list or table may be read: as for clips, a file in the folder must not be a link out of it.

    A file outside the folder was named by a flag, so the user chose it.
    """
    inside = os.path.join(root, "")
    problem = rules.problem_with(file.removeprefix(inside), root, "list") if file.startswith(inside) else None
    if problem is not None:
        problems.add(problem[0], f"{root}: {problem[1]}")
    return problem is None


def _find_table(root: str, name: str, alone: bool, problems: Problems) -> str | None:
    """Returns the file of --dataset_file, which is relative to the folder or else to the working directory.

    A file outside the folder is only accepted if there is a single folder. Otherwise the folders for training and
    validation would both read it, and validation would measure clips that are trained on.
    """
    for file in (os.path.normpath(os.path.join(root, name)), os.path.abspath(name)):
        if os.path.isfile(file) and (alone or file.startswith(os.path.join(root, ""))):
            return file
    fix = "" if alone else "; of several folders each needs its own"
    problems.add("no table", f"--dataset_file {name}: no such file in {root}{fix}; there are: {_text_files(root)}")
    return None


def _detect_form(root: str, rules: PathRules, problems: Problems) -> Columns:
    """Reads a folder for which no flag names a file: its table, else its lists, else its clips with captions."""
    captions, videos = _files(root, CAPTION_FILES), _files(root, VIDEO_FILES)
    tables = _files(root, TABLE_FILES)
    choices = {name: f"--dataset_file {quote(name)}" for name in tables}
    if captions and videos:
        choices[f"{captions[0]} with {videos[0]}"] = f"--caption_column {quote(captions[0])}"
    if len(choices) > 1:
        fix = f"choose with {' or '.join(choices.values())}"
        problems.add("two data sets", f"{root}: {' and '.join(choices)} are two data sets; {fix}")
        return Columns()
    if tables:
        return _read_table(root, os.path.join(root, tables[0]), NO_NAMES, rules, problems)
    if captions or videos:
        return _read_lists(root, NO_NAMES, rules, problems)
    columns = _read_pairs(root, rules, problems)
    if _is_output(root) and (problems or columns.videos is None):
        problems.add("an output", f"{root}: is a folder that was prepared here; to train on it add --load_tensors")
    return columns


def _files(root: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if os.path.isfile(os.path.join(root, name))]


def _text_files(root: str) -> str:
    """Returns up to ten names of files that the user may have meant: lists and tables, or else all files."""
    names = _files(root, _names(root, Problems()))
    return first_names([name for name in names if name.endswith((".txt", *TABLE_READERS))] or names)


def _read_lists(root: str, names: Names, rules: PathRules, problems: Problems) -> Columns:
    """Reads lists that have a line for each clip; a name that is None stands for the usual names of that list."""
    captions = _read_list(root, names[0], CAPTION_FILES, "--caption_column", rules, problems)
    videos = _read_list(root, names[1], VIDEO_FILES, "--video_column", rules, problems)
    # images.txt belongs to videos.txt; a list with another name may be about other clips.
    has_images = names[2] is not None or (names[1] is None and _files(root, IMAGE_FILES))
    images = _read_list(root, names[2], IMAGE_FILES, "--image_column", rules, problems) if has_images else None
    videos, images = _trimmed(videos), _trimmed(images)
    # Blank captions at the end stay, because caption_dataset.py leaves a blank line for each that it has not written.
    captions = _trimmed(captions, len(videos.values) if videos is not None else 0)
    for paths, what in ((videos, "a path"), (images, "an image")):
        if captions is not None and paths is not None:
            _check_counts(captions, paths, what, problems)
    file = names[0] or next(iter(_files(root, CAPTION_FILES)), CAPTION_FILES[0])
    return Columns(captions, videos, images, caption_file=os.path.normpath(os.path.join(root, file)))


def _trimmed(column: Column | None, least: int = 0) -> Column | None:
    return None if column is None else replace(column, values=_without_blank_end(column.values, least))


def _without_blank_end(values: Sequence[str | None], least: int = 0) -> Sequence[str | None]:
    """Returns the values without blank ones at the end, but at least the first ``least`` of them."""
    end = len(values)
    while end > least and values[end - 1] == "":
        end -= 1
    return values[:end]


def _read_list(
    root: str, name: str | None, defaults: Sequence[str], flag: str, rules: PathRules, problems: Problems
) -> Column | None:
    """Returns the lines of a list, including blank ones; None if there is no such list or it cannot be read."""
    files = _files(root, defaults if name is None else (name,))
    if not files:
        listed = f"{flag} {name}" if name is not None else f"{' or '.join(defaults)} ({flag})"
        hint = "; for a column of a table give --dataset_file too" if _files(root, TABLE_FILES) else ""
        rule = f"{listed}: no such file in {root}; there are: {_text_files(root)}{hint}"
        if name is None and defaults is CAPTION_FILES:
            problems.add(NO_CAPTIONS, f"{rule}; {WITHOUT_CAPTIONS}")
        else:
            problems.add("no list", rule)
        return None
    file = os.path.normpath(os.path.join(root, files[0]))
    if not _may_read(root, file, rules, problems) or (lines := read_lines(file, problems)) is None:
        return None
    values = [line if line is None else line.strip() for line in (lines[:-1] if lines[-1] == "" else lines)]
    if not _without_blank_end(values):
        values = []
    if not values:
        problems.add("empty list", f"{file}: is empty; it needs one line for each clip")
    return Column(values, lambda row: f"{file}:{row + 1}", "remove its line from each list", root)


def _check_counts(captions: Column, paths: Column, what: str, problems: Problems) -> None:
    if len(captions.values) == len(paths.values) or not (captions.values and paths.values):
        return  # an empty list is reported as another problem
    pairs = ((captions, paths, what), (paths, captions, "a caption"))
    longer, shorter, missing = max(pairs, key=lambda pair: len(pair[0].values))
    first = len(shorter.values)
    file = shorter.location(0).rpartition(":")[0]
    counts = f"{len(longer.values)} lines, but {file} has {first}"
    fix = "add a line there or remove this one"
    problems.add("unequal line counts", f"{longer.location(first)}: first line without {missing} ({counts}); {fix}")


@dataclass
class _Scan:
    """Groups the files below a root by kind.

    Media, texts and other files are stored by their path without its last suffix, in Unicode's composed form (NFC), so
    that a clip and its caption have the same key.
    """

    media: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    texts: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    tables: list[str] = field(default_factory=list)
    others: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @cached_property
    def pictures(self) -> dict[str, str]:
        """One image of each folder that has several images and no videos, and the name of a caption without a clip."""
        found: dict[str, list[str]] = defaultdict(list)
        for stem, names in self.media.items():
            if (folder := os.path.dirname(stem)) in self.texts and folder not in self.media:
                found[folder].append(names[0])
        return {folder: names[0] for folder, names in found.items() if len(names) > 1 and all(map(is_image, names))}

    def captions_elsewhere(self) -> dict[str, str]:
        """Returns the captions without a clip by the clips that have their name in another folder and no caption."""
        clips, texts = by_name(self.media.keys() - self.texts.keys()), by_name(self.texts.keys() - self.media.keys())
        return {
            clips[name][0]: texts[name][0]
            for name in clips.keys() & texts.keys()
            if len(clips[name]) == len(texts[name]) == 1
        }


def _read_pairs(root: str, rules: PathRules, problems: Problems) -> Columns:
    """Reads media files with the captions next to them, in the order of their paths."""
    scan = _scan(root, rules, problems)
    _match_captions(scan)
    if scan.media.keys().isdisjoint(scan.texts):
        if _is_one_table(choices := _choices_below(root, scan)):
            return _read_table(root, os.path.join(root, *choices), NO_NAMES, rules, problems)
        if choices:
            if not _is_output(root):  # its tables are about the tensors
                _add_choices(root, choices, problems)
            return Columns()
    if not scan.media:
        lists = f"{' or '.join(CAPTION_FILES)} with {VIDEO_FILES[0]}"
        accepted = f"{lists}, {', '.join(TABLE_FILES)}, clip.mp4 with clip.txt"
        problems.add("no data set", f"{root}: has none of: {accepted}; there are: {_text_files(root)}")
        return Columns()
    elsewhere = scan.captions_elsewhere()
    for stem in sorted((scan.media.keys() | scan.texts.keys()) - set(elsewhere.values())):
        _check_pair(root, stem, scan, elsewhere, problems)
    texts = {names[0]: scan.texts.get(stem, [""])[0] for stem, names in scan.media.items()}
    videos = sorted(texts)
    captions = [texts[video] for video in videos]
    missing = None if problems.captions else ""  # None marks a value that is among the problems
    values = [_read_caption(root, name, rules, problems) if name else missing for name in captions]
    return Columns(
        Column(values, lambda row: os.path.join(root, captions[row]), "remove the clip", root),
        Column(videos, lambda row: root, "remove it", root),
        skipped=[os.path.join(root, name) for names in scan.others.values() for name in names],
        unread_tables=[] if _is_output(root) else [os.path.join(root, name) for name in scan.tables],
    )


def _scan(root: str, rules: PathRules, problems: Problems) -> _Scan:
    scan = _Scan()
    for path in _walk(root, rules, problems):
        stem, suffix = os.path.splitext(unicodedata.normalize("NFC", path))
        suffix = suffix.lower()
        if suffix in MEDIA_SUFFIXES:
            scan.media[stem].append(path)
        elif suffix == ".txt":
            scan.texts[stem].append(path)
        elif os.path.basename(path) in TABLE_FILES or (suffix in TABLE_SUFFIXES and os.sep not in path):
            scan.tables.append(path)
        elif suffix not in TEXT_SUFFIXES:
            scan.others[stem].append(path)
    return scan


_LABELS = re.compile(r"(.*/|)labels/")  # the last such folder of a path


def _match_captions(scan: _Scan) -> None:
    """Assigns captions to clips whose paths differ in letter case, or are in videos/ where the caption is in labels/.

    This is done only where exactly one clip and one caption without a partner match.
    """
    clips: dict[str, list[str]] = defaultdict(list)
    captions: dict[str, list[str]] = defaultdict(list)
    for stem in scan.media.keys() - scan.texts.keys():
        clips[fold_name(stem)].append(stem)
    for stem in scan.texts.keys() - scan.media.keys():
        captions[fold_name(_LABELS.sub(r"\1videos/", stem))].append(stem)
    for key in clips.keys() & captions.keys():
        if len(clips[key]) == len(captions[key]) == 1:
            scan.texts[clips[key][0]] = scan.texts.pop(captions[key][0])


def _choices_below(root: str, scan: _Scan) -> dict[str, str]:
    """Returns the files below a folder without pairs that may name its clips, each with the flag that selects it."""
    choices = {path: f"--dataset_file {quote(path)}" for path in sorted(scan.tables)}
    for folder in sorted({os.path.dirname(name) for names in scan.texts.values() for name in names} - {""}):
        captions, videos = (_files(os.path.join(root, folder), names) for names in (CAPTION_FILES, VIDEO_FILES))
        if captions and videos:
            lists = f"{os.path.join(folder, captions[0])} with {videos[0]}"
            choices[lists] = f"--data_root {quote(os.path.join(root, folder))}"
    return choices


def _is_one_table(choices: dict[str, str]) -> bool:
    return len(choices) == 1 and os.path.basename(next(iter(choices))) in TABLE_FILES


def _add_choices(root: str, choices: dict[str, str], problems: Problems) -> None:
    """Reports that only a flag can tell which of several files names the clips of a folder."""
    shown = list(choices)[:3]
    which = " and ".join(shown) + (", ..." if len(choices) > 3 else "")
    fix = ("choose with " if len(choices) > 1 else "give ") + " or ".join(choices[name] for name in shown)
    problems.add("unclear data set", f"{root}: has no captions next to its clips, but {which}; {fix}")


def _walk(root: str, rules: PathRules, problems: Problems) -> Iterator[str]:
    """Yields the path of each file below the root, relative to it, without hidden files, JUNK and prepared tensors.

    Linked folders are followed if they may be read. They come last, so that a folder which is also reached without a
    link keeps its own path.
    """
    folders, links = [""], list[str]()
    seen = set()
    while folders or links:
        folder = (folders or links).pop()
        real = os.path.realpath(os.path.join(root, folder))
        if real in seen:
            continue
        seen.add(real)
        if not rules.allows(real):
            fix = f"remove the link or pass --allow_path {quote(real)}"
            problems.add("outside the data root", f"{root}: {folder}: leads outside the data root, to {real}; {fix}")
            continue
        for name in _names(os.path.join(root, folder), problems):
            path = os.path.join(folder, name)
            full = os.path.join(root, path)
            if os.path.isdir(full):
                if _is_output(full) or (path == PREVIEW_FOLDER and _is_output(root)):
                    continue
                (links if os.path.islink(full) else folders).append(path)
            else:
                yield path


def _is_output(folder: str) -> bool:
    """Returns whether this suite wrote the folder, as a preparation or a training run."""
    return any(all(os.path.isfile(os.path.join(folder, name)) for name in names) for names in OUTPUTS)


def _names(folder: str, problems: Problems) -> list[str]:
    try:
        names = os.listdir(folder)
    except OSError as error:
        problems.add("unreadable folder", f"{folder}: cannot be read ({error.strerror}); check its permissions")
        return []
    return sorted(name for name in names if is_listed(name) and name != TENSOR_FOLDER)


def _check_pair(root: str, stem: str, scan: _Scan, elsewhere: Mapping[str, str], problems: Problems) -> None:
    """Reports a clip without exactly one caption, and a caption without exactly one clip.

    Args:
        root: The folder.
        stem: A path without its suffix.
        scan: The files of the folder.
        elsewhere: Captions in other folders than their clips, by the clip.
        problems: Collects what is wrong.
    """
    media, texts = scan.media.get(stem, []), scan.texts.get(stem, [])
    for kind, names in (("clips", media), ("captions", texts)):
        if len(names) > 1:
            problems.add(f"{kind} of one name", f"{root}: {_same_names(kind, names)}")
    if stem in elsewhere:
        folder = os.path.join(os.path.dirname(scan.texts[elsewhere[stem]][0]), "")
        rule = f"has no caption; move it next to the clip, from {folder or root}"
        problems.add(CAPTION_ELSEWHERE, f"{root}: {media[0]}: {rule}; {WITHOUT_CAPTIONS}")
    elif not texts and os.path.dirname(stem) not in scan.pictures:
        fix = "write it next to the clip, into a file of the same name that ends in .txt"
        if stem in scan.others:  # such as .caption, which other trainers read
            fix += f", not in {os.path.splitext(scan.others[stem][0])[1]}"
        problems.add(NO_CAPTION, f"{root}: {media[0]}: has no caption; {fix}; {WITHOUT_CAPTIONS}")
    if not media and stem in scan.others:
        other = scan.others[stem][0]
        fix = "convert it to mp4, or an image to png"
        problems.add("unknown format", f"{root}: {other}: has a caption, but its format is not supported; {fix}")
    elif not media and not _is_document(texts[0]):
        fix = "add the clip, or rename it to end in something else"
        if (picture := scan.pictures.get(stem)) is not None:
            folder, suffix = os.path.dirname(picture), os.path.splitext(picture)[1]
            images, clip = quote(f"{folder}/*{suffix}"), quote(f"{folder}.mp4")
            command = f"`ffmpeg -framerate 24 -pattern_type glob -i {images} {clip}`"
            fix = f"make a clip of the pictures in {folder}/, {command}, and move them out of the data set"
        clips = scan.media.get(os.path.splitext(stem)[0], [])
        if any(unicodedata.normalize("NFC", clip) == stem for clip in clips):
            fix = "leave the suffix of the clip out of its name, as in clip.mp4 and clip.txt"
        problems.add("caption without a clip", f"{root}: {texts[0]}: is a caption without a clip; {fix}")


def _same_names(kind: str, names: Sequence[str]) -> str:
    """Describes files that share a name apart from suffix, letter case, or the coding of accents."""
    if len({os.path.splitext(name)[0] for name in names}) == 1:
        return f"{' and '.join(sorted(names))}: are {kind} of one name; rename all but one"
    accents = "differ only in how their accents are coded (composed or decomposed Unicode)"
    return f"{' and '.join(ascii(name)[1:-1] for name in sorted(names))}: {accents}; rename all but one"


def _is_document(path: str) -> bool:
    """Returns whether a text is about the data set, judged by its name, such as README.txt or LICENSE-2.0.txt."""
    return re.split(r"[\W_]", fold_name(os.path.basename(path)), maxsplit=1)[0] in DOCUMENTS


def _read_caption(root: str, name: str, rules: PathRules, problems: Problems) -> str | None:
    """Returns the stripped text of a caption file, or None if it breaks a rule, which is then among the problems."""
    if (problem := rules.problem_with(name, root, "caption")) is not None:
        problems.add(problem[0], f"{root}: {problem[1]}")
        return None
    lines = read_lines(os.path.join(root, name), problems)
    if lines is None or None in lines:
        return None
    return "\n".join(line for line in lines if line is not None).strip()
