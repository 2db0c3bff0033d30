"""What a training script looks at before anything heavy is imported; beside these, what its task asks of the model."""

from cogvideox.args import check_trackers
from cogvideox.data.decord_reader import check_reader
from cogvideox.data.index import check_data
from cogvideox.factory import check_tensors
from cogvideox.hub import check_hub
from cogvideox.lora_file import check_lora
from cogvideox.optimizers import check_optimizer
from cogvideox.prompts import check_prompts

TRAINING_CHECKS = (
    *(check_data, check_reader, check_tensors, check_optimizer, check_lora),
    *(check_prompts, check_trackers, check_hub),
)
