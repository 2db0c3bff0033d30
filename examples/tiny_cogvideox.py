"""Makes random CogVideoX pipelines of about 2 MB, for tests and for trying a script on a CPU.

The module has tiny configs of the five published layouts. All classes are the real ones; only widths and depths are
small. The VAE compresses 8 times in space and 4 times in time as usual, so the latent of 9 x 64 x 96 pixels is
3 x 16 x 8 x 12 (FCHW).

    python examples/tiny_cogvideox.py --output_dir tiny/5b --kind 5b
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

KINDS = ("2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v")
FRAMES, HEIGHT, WIDTH = 9, 64, 96
TEXT_LENGTH, TEXT_DIM, TIME_DIM = 32, 32, 64
RECIPE_FILE = "tiny.json"

STYLES = ("BW_STYLE", "DISNEY_STYLE", "TOY_STYLE", "PIXEL_STYLE")
ALPHABET = "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z a b c d e f g h i j k l m n o p q r s t u v w x y z"
SIGNS = "0 1 2 3 4 5 6 7 8 9 . , ; : ! ? ' \" - _ ( ) [ ] / & % + ="
CAPTIONS = (
    "A red square moves slowly to the right over a plain grey background.",
    "A green disc falls from the top to the bottom of a dark blue frame.",
    "A yellow ball bounces up and down on a white floor while the camera stays still.",
    "A small blue triangle turns around its centre in front of a black wall.",
    "A black and white cartoon mouse steers a boat down a river and whistles a tune.",
    "A fat grey cartoon rabbit crawls out of a dark burrow in a mossy bank and holds on to a boulder.",
    "The big grey rabbit stands up in a sunlit meadow, throws both arms into the air, yawns and rubs its brow.",
    "A plump rabbit tips its head back and stretches with its mouth wide open in front of bright green grass.",
    "The cartoon rabbit drops one arm and lifts the other hand in a green meadow.",
    "Four tall skyscrapers stand at night, their windows lit in green and white under a purple sky.",
    "The camera drifts past a curved glass tower with warm lights in its windows, seen from below.",
    "A lower office block glows in pale stripes beside the bright roof of a tower against a dark night sky.",
    "A dark tower with wavy white balconies leans over a street in the city.",
    "Two office towers with bright white lights rise into a dark blue night sky in front of a third.",
    "A woman in a long coat walks along a wet street at night while cars pass behind her.",
    "A man with a beard talks in a car and looks out of the window at the trees.",
    "Two children run across a beach toward the sea, and a dog jumps in the water.",
    "A close-up of a cup of coffee on a wooden table, steam rising in the morning light.",
    "An old train crosses a stone bridge in the mountains, snow on the ground and clouds above.",
    "A cat sleeps on a chair by the fire, then opens its eyes and turns its head to the camera.",
    "A bird flies over a quiet lake at sunset, orange light on the water.",
    "A toy robot walks on a shelf between books, its eyes glowing blue.",
    "The video shows a garden in the rain, with flowers moving gently in the wind.",
    "A drone shot of a green forest and a winding road with one white truck.",
    "A chef cuts vegetables in a busy kitchen, hands moving fast, shallow depth of field.",
    "A young girl in a yellow dress dances in a field of tall grass, slow motion.",
)


def is_image_to_video(kind: str) -> bool:
    """Returns whether a kind takes a first frame."""
    return kind.endswith("i2v")


def is_version_1_5(kind: str) -> bool:
    """Returns whether a kind is of CogVideoX 1.5."""
    return kind.startswith("1.5")


def make_tiny(folder: Path, kind: str = "5b", seed: int = 0, dtype: torch.dtype | None = None) -> Path:
    """Writes a tiny pipeline, unless the folder already has this pipeline. The same arguments give the same bytes.

    The global random state of torch does not change.

    Args:
        folder: The folder to write; new or empty.
        kind: The published layout, one of KINDS.
        seed: Seed of the random weights.
        dtype: Type of the weights; float32 by default.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder has other content.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: choose one of {', '.join(KINDS)}")
    target = Path(folder).resolve()
    recipe = {"kind": kind, "seed": seed, "dtype": str(dtype or "torch.float32")}
    if target.exists() and any(target.iterdir()):
        _check_existing(target, recipe)
        return Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    # The folder is renamed when it is complete, so that a killed run never leaves an incomplete pipeline under its
    # name.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        built = Path(temporary) / "pipeline"
        save_pipeline(_build(kind, seed, dtype), built)
        (built / RECIPE_FILE).write_text(json.dumps(recipe) + "\n")
        built.rename(target)
    return Path(folder)


def _check_existing(folder: Path, recipe: dict[str, Any]) -> None:
    """Raises FileExistsError if a folder is not the tiny pipeline of this recipe."""
    found = folder / RECIPE_FILE
    if not found.is_file() or json.loads(found.read_text()) != recipe:
        raise FileExistsError(f"{folder} is not empty and not the tiny pipeline {recipe}: remove it or choose another")


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """Saves a pipeline with save_pretrained, without its progress bars."""
    from transformers.utils import logging

    # transformers draws a progress bar for each file that it writes.
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        pipeline.save_pretrained(folder)
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _build(kind: str, seed: int, dtype: torch.dtype | None) -> Any:
    """Returns a pipeline with random weights.

    Args:
        kind: The published layout that is copied.
        seed: The seed of the weights.
        dtype: The type of the weights; float32 if None.
    """
    import diffusers
    import torch

    tokenizer = make_tokenizer()
    with seeded(seed):
        modules = {
            "vae": _vae(kind),
            "text_encoder": make_text_encoder(len(tokenizer)),
            "transformer": _transformer(kind),
        }
    # This is needed for float32 too, because the table of learned positions is computed in float64.
    modules = {name: module.to(dtype or torch.float32) for name, module in modules.items()}
    name = "CogVideoXImageToVideoPipeline" if is_image_to_video(kind) else "CogVideoXPipeline"
    return getattr(diffusers, name)(tokenizer=tokenizer, scheduler=make_scheduler(kind), **modules)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch's CPU generator within a block, and restores its state afterwards."""
    import torch

    # Only the CPU generator is seeded. torch.manual_seed would also seed those of CUDA, which are not restored here.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _vae(kind: str) -> Any:
    """Returns a small VAE with random weights."""
    from diffusers import AutoencoderKLCogVideoX

    return AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 8, 8),
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=4,
        sample_height=HEIGHT,
        sample_width=WIDTH,
        scaling_factor=1.15258426 if kind == "2b" else 0.7,
        invert_scale_latents=kind == "1.5-5b-i2v",
    ).eval()


def make_text_encoder(vocabulary: int, width: int = TEXT_DIM) -> Any:
    """Returns a random T5 encoder whose output still depends clearly on the tokens."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config).eval()


def _transformer(kind: str) -> Any:
    """Returns a small transformer with random weights."""
    import torch
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=2,
        in_channels=32 if is_image_to_video(kind) else 16,
        out_channels=16,
        time_embed_dim=TIME_DIM,
        # Its embedding is added to the time embedding, so it has the same size.
        ofs_embed_dim=TIME_DIM if kind == "1.5-5b-i2v" else None,
        text_embed_dim=TEXT_DIM,
        max_text_seq_length=TEXT_LENGTH,
        sample_height=HEIGHT // 8,
        sample_width=WIDTH // 8,
        sample_frames=FRAMES,
        patch_size=2,
        patch_size_t=2 if is_version_1_5(kind) else None,
        patch_bias=not is_version_1_5(kind),
        use_rotary_positional_embeddings=kind != "2b",
        use_learned_positional_embeddings=kind == "5b-i2v",
    )
    if kind == "5b-i2v":
        # A trained table differs from the sinusoidal table that it starts from. If both were equal, tests would not
        # notice code that recomputes the table.
        video_part = model.patch_embed.pos_embedding[:, TEXT_LENGTH:]
        video_part += 0.1 * torch.randn(video_part.shape)
    return model.eval()


def make_scheduler(kind: str) -> Any:
    """Returns the scheduler that the published model of this kind has."""
    import diffusers

    name = "CogVideoXDDIMScheduler" if kind == "2b" else "CogVideoXDPMScheduler"
    return getattr(diffusers, name)(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        snr_shift_scale=3.0 if kind == "2b" else 1.0,
        set_alpha_to_one=True,
        clip_sample=False,
    )


def make_tokenizer(captions: Sequence[str] = CAPTIONS) -> Any:
    """Returns a T5 tokenizer that has every word of the captions as one piece."""
    from transformers import T5Tokenizer

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "spiece.model").write_bytes(_sentencepiece_model(captions))
        tokenizer = T5Tokenizer.from_pretrained(folder, extra_ids=100, model_max_length=TEXT_LENGTH)
    # Otherwise, the name of the temporary folder would be saved.
    tokenizer.name_or_path = ""
    return tokenizer


def _sentencepiece_model(captions: Sequence[str]) -> bytes:
    """Returns a unigram model of a few hundred pieces with the ids of T5: pad 0, eos 1, unk 2, no bos."""
    from sentencepiece import SentencePieceTrainer

    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(_text(captions)),
        model_writer=written,
        model_type="unigram",
        vocab_size=600,
        hard_vocab_limit=False,
        split_by_unicode_script=False,  # "cat," must stay one word, see _text
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,  # the pieces' scores depend on the order of the sums
        minloglevel=2,
    )
    return written.getvalue()


def _text(captions: Sequence[str]) -> list[str]:
    """Returns the captions, each of their words alone, and single characters, so that no text has unknown pieces."""
    words = sorted({word.strip(".,") for caption in captions for word in caption.split()} | set(STYLES))
    # Only strings that occur in two different words can become pieces. With the signs, a complete word is such a
    # string.
    return [*captions, *(word + sign for word in words for sign in ("", ",", ".")), ALPHABET, SIGNS]


def _parse() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description="Write a random tiny CogVideoX pipeline.")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write; new or empty")
    parser.add_argument("--kind", choices=KINDS, default="5b", help="which published layout (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Writes a random pipeline."""
    options = _parse()
    try:
        folder = make_tiny(options.output_dir, options.kind, options.seed)
    except FileExistsError as error:
        raise SystemExit(str(error)) from None
    print(f"{folder}: CogVideoX {options.kind}, random weights, {FRAMES} frames of {HEIGHT}x{WIDTH}")


if __name__ == "__main__":
    main()
