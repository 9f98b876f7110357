"""The place of a student folder: what an export may replace."""

import re
from pathlib import Path

from distill.errors import OutputError, TeacherError
from distill.models.sd3_files import DECODER, DECODER_CONFIG, DECODER_WEIGHTS, RECORD, read_json

_PARTS = r"transformer|vae|scheduler|text_encoder(_[23])?|tokenizer(_[23])?|image_encoder|feature_extractor"
_WEIGHTS = r"(diffusion_pytorch_)?model(\.(fp|bf)16)?(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
_SETTINGS = (
    r"(config|scheduler_config|preprocessor_config|tokenizer|tokenizer_config|vocab|added_tokens|special_tokens_map)"
)
# Every file that a student folder may hold. A folder with other files is not replaced.
_WRITTEN = re.compile(
    rf"README\.md|model_index\.json|{re.escape(RECORD)}|(pytorch_lora_weights|second_time)\.safetensors"
    rf"|{DECODER}/({DECODER_CONFIG}|{DECODER_WEIGHTS}|README\.md)"
    rf"|({_PARTS})/({_WEIGHTS}|{_SETTINGS}\.json|merges\.txt|spiece\.model)"
)


def check_place(out: Path, teacher: Path) -> None:
    """Raise OutputError unless `out` is absent, empty, or an exported student without other files."""
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out} is a file; name a folder for the student")
    if out.resolve() == teacher.resolve():
        raise OutputError(f"{out} is the folder of the teacher; name another folder for the student")
    held = [path for path in out.rglob("*") if path.is_symlink() or not path.is_dir()]
    if not held:
        return
    try:
        ours = {"start_time", "made_with"} <= read_json(out / RECORD).keys()
    except TeacherError:
        ours = False
    if not ours:
        raise OutputError(f"{out} holds other files ({held[0].relative_to(out)}) but no student; name a new folder")
    for path in held:
        if not _WRITTEN.fullmatch(path.relative_to(out).as_posix()):
            raise OutputError(
                f"{out} holds {path.relative_to(out)} in addition to a student; move that file, or name another folder"
            )
