"""Defines what the ledger records about each file: its status, its properties, and how it is cut.

A ``ClipRecord`` is one line of ledger.jsonl. ``to_json`` and ``from_json`` convert it to and from the values of that
line, and nothing else in the library knows the names of its fields in the file:

    ClipRecord           status, hash of the content, or the reason why the file cannot be used
      Source             size, rate and codec of the file
      Cut, ...           one for each bucket that the clip fills
        Variant, ...     one for each augmentation: indices of frames, resize, crop and flip
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from cogvideox.config.buckets import Bucket
from cogvideox.data.media.frames import VideoInfo
from cogvideox.data.media.transforms import Fit

OK, FAILED, SHORT, SMALL = "ok", "failed", "short", "small"
UNREADABLE = "unreadable"  # the file system refused access; the next preparation tries again
KILLED = "killed"  # the decoder crashed, hung or used too much memory; tried again under other limits
STATUSES = (OK, FAILED, SHORT, SMALL, UNREADABLE, KILLED)


@dataclass(frozen=True)
class Source:
    """Describes a file as it was probed.

    Attributes:
        frames: Number of frames that are shown.
        fps: Frames per second, rounded to three decimals.
        height: Height in pixels as shown.
        width: Width in pixels as shown.
        codec: FFmpeg's name of the codec.
        conversions: Names of what is done to the pixels beyond a plain decode; see ``VideoInfo``.
        matrix_is_assumed: Whether the file does not name its color matrix, although one is needed.
    """

    frames: int
    fps: float
    height: int
    width: int
    codec: str
    conversions: tuple[str, ...] = ()
    matrix_is_assumed: bool = False

    @classmethod
    def of(cls, info: VideoInfo) -> Self:
        """Returns the part of what ``probe`` returned that the ledger stores."""
        size = (info.height, info.width)
        return cls(
            info.num_frames, round(info.fps, 3), *size, info.codec, tuple(info.conversions), info.matrix_is_assumed
        )

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Restores a source from its JSON form."""
        return cls(**values | {"conversions": tuple(values.get("conversions", ()))})

    def to_json(self) -> dict[str, object]:
        """Returns the JSON form; conversions and an assumed matrix appear only where there are some."""
        values = asdict(self)
        return {name: value for name, value in values.items() if name not in ABSENT_IF_FALSE or value}


@dataclass(frozen=True)
class Variant:
    """Describes one way to cut a clip.

    Attributes:
        indices: Frames of the file, in display order, counted from 0.
        fit: How a frame becomes the size of the bucket.
        reader: Which library decodes, "pyav" or "decord".
        conversions: Names of what is done to the pixels beyond a plain decode; see ``VideoInfo``.
    """

    indices: tuple[int, ...]
    fit: Fit
    reader: str
    conversions: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Restores a variant from its JSON form."""
        conversions = tuple(values.get("conversions", ()))
        return cls(tuple(values["indices"]), Fit(**values["fit"]), values["reader"], conversions)

    def to_json(self) -> dict[str, object]:
        """Returns the JSON form for the ledger and for the hashes that become cache keys.

        Conversions are left out where there are none, because older versions did not have the field, and the keys of
        such files must not change.
        """
        values = asdict(self)
        return {name: value for name, value in values.items() if name not in ABSENT_IF_FALSE or value}

    def first_frame(self, image: Source | None = None) -> "Variant":
        """Returns the variant for the first frame of the clip.

        Args:
            image: An image that replaces the clip's own first frame; it is cut as the clip is.
        """
        if image is None:
            return replace(self, indices=self.indices[:1])
        return replace(self, indices=(0,), conversions=image.conversions)


# Fields of Source and Variant that their JSON form has only if they are not empty or false.
ABSENT_IF_FALSE = ("conversions", "matrix_is_assumed")


@dataclass(frozen=True)
class Cut:
    """Describes how a clip is cut for one bucket, in one or more variants."""

    bucket: Bucket
    variants: tuple[Variant, ...]

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Restores a cut from its JSON form."""
        return cls(Bucket(**values["bucket"]), tuple(map(Variant.from_json, values["variants"])))

    def to_json(self) -> dict[str, object]:
        """Returns the JSON form."""
        return {"bucket": asdict(self.bucket), "variants": [variant.to_json() for variant in self.variants]}


@dataclass(frozen=True)
class ClipRecord:
    """Records whether a file can be used and how it is cut, or why it cannot be used.

    A usable record (status OK) in the ledger has a stamp, a source, the hash of the content and its cuts. An image that
    is a first frame has no cuts, because it is cut as its clip is. Any other record has a reason, and what was known
    of the file before it was given up.

    Attributes:
        request: Hash of the path, size and time of the file and of the recipe; the name of the record in the ledger.
        path: The file.
        status: One of STATUSES.
        reason: Why the file cannot be used; empty if it can.
        limits: Seconds and bytes of memory under which the decoder was killed, if it was.
        stamp: Size and time of the last change of the file when it was probed; [] if it did not exist, None if it was
            not probed.
        source: Properties of the file; None if it could not be probed.
        available: Number of frames that a clip can give at the rate of the recipe; None for images.
        content: SHA-256 of the content in hexadecimal digits; empty if the file cannot be used.
        cuts: How the clip is cut, for each bucket that it fills.
        image: Record of the image that the data set names as the first frame of the clip.
    """

    request: str
    path: str
    status: str
    reason: str = ""
    limits: list[float] | None = None
    stamp: list[int] | None = None
    source: Source | None = None
    available: int | None = None
    content: str = ""
    cuts: tuple[Cut, ...] = ()
    image: "ClipRecord | None" = None

    @property
    def usable(self) -> bool:
        """Whether the file can be used."""
        return self.status == OK

    @property
    def probed(self) -> Source:
        """Properties of a file that was probed, as every usable one was."""
        assert self.source is not None, f"{self.path} was not probed"
        return self.source

    @property
    def first_frame(self) -> "ClipRecord":
        """Record of the file that the first frame is taken from: the image that the data set names, or the clip."""
        return self.image or self

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ClipRecord | None":
        """Restores a record from a line of the ledger; returns None if required fields are missing or malformed."""
        required = ("content", "cuts", "stamp", "source") if values.get("status") == OK else ("reason",)
        if values.get("status") not in STATUSES or not all(name in values for name in required):
            return None
        try:
            return cls(
                values["request"],
                values["path"],
                values["status"],
                values.get("reason", ""),
                values.get("limits"),
                values.get("stamp"),
                Source.from_json(values["source"]) if "source" in values else None,
                values.get("available"),
                values.get("content", ""),
                tuple(map(Cut.from_json, values.get("cuts", ()))),
                cls.from_json(values["image"]) if "image" in values else None,
            )
        except (AttributeError, KeyError, TypeError, ValueError):
            return None

    def to_json(self) -> dict[str, object]:
        """Returns the values of a line of the ledger; what is not known is absent."""
        values = {
            "request": self.request,
            "path": self.path,
            "status": self.status,
            "reason": self.reason,
            "limits": self.limits,
            "stamp": self.stamp,
            "source": None if self.source is None else self.source.to_json(),
            "available": self.available,
            "content": self.content,
            "cuts": [cut.to_json() for cut in self.cuts] if self.usable else None,
            "image": None if self.image is None else self.image.to_json(),
        }
        return {name: value for name, value in values.items() if value is not None and value != ""}
