"""The model card of `finetune.py --export`: what a model is, how it was made, its numbers, its loading."""
import json
import os

CARD = """---
tags: [biology, genomics, dna]
library_name: {library}
---
# {title}

{what} Made with nanoDNA's `{method}`.

- steps: {step}; fingerprint of the data (genome, or splits): `{data}`
- tokens: {tokens}
- numbers: {numbers}

## Use

```python
{use}
```

## Limits

It has seen reference sequence (and, fine-tuned, one labelled data set) only: populations, other species and
other assays may differ. Not for clinical use. Benchmarks on the genome that it has seen are not independent.

## How it was made

```json
{args}
```

Cite {cite}, and nanoDNA.
"""
USE_BERT = """from transformers import {auto}, AutoTokenizer
model, tokenizer = {auto}.from_pretrained("FOLDER"), AutoTokenizer.from_pretrained("FOLDER")
dna = "ACGTTGCAACGTTGCA"
words = " ".join(dna[i:i + {k}] for i in range(0, len(dna) - {k} + 1, {stride}))
print(model(**tokenizer(words, return_tensors="pt")).logits.shape)"""
USE_MIXER = """import json, torch                                    # beside nanoDNA's data.py and models.py
from safetensors.torch import load_file
import data, models
net = models.make_backbone(json.load(open("FOLDER/config.json"))["mixer"]).eval()
weights = load_file("FOLDER/model.safetensors")
net.load_state_dict({name[9:]: w for name, w in weights.items() if name.startswith("backbone.")})
bases = torch.from_numpy(data.encode("ACGTTGCAACGTTGCA"))[None]
print(net(data.one_hot(bases)).shape)                      # (1, bases, channels)"""
CITE = {"randommask": "Liang et al., Rethinking the BERT-like Pretraining for DNA Sequences",
        "cm_gems": "Roy et al., GeneMask and CM-GEMS", "findna": "Yu et al., Self-Distillation Improves DNA "
        "Sequence Inference", "finetune": "the paper of the pretrained model and of the data set"}


def model_card(state, spec, folder, numbers):
    """README.md of the export of a checkpoint, `state`, into `folder`; numbers: scores or losses."""
    fine_tuned, mixer = "classes" in spec, spec["kind"] == "mixer"
    use, tokens = USE_MIXER, "single bases, one-hot A, C, G, T, N"
    if not mixer:
        auto = "AutoModelForSequenceClassification" if fine_tuned else "AutoModelForMaskedLM"
        use = USE_BERT.format(auto=auto, k=spec["k"], stride=spec["stride"])
        tokens = f"{spec['k']}-mers, stride {spec['stride']}, upper case, blanks between"
    return CARD.format(
        library="safetensors" if mixer else "transformers", title=os.path.basename(folder.rstrip("/")),
        what=f"A model of {', '.join(spec['classes'])}." if fine_tuned else "A pretrained DNA model.",
        method=state["method"], step=state["step"], data=state["data"], tokens=tokens,
        numbers=json.dumps(numbers) if numbers else "none recorded", use=use.replace("FOLDER", folder),
        args=json.dumps(state["args"], indent=1), cite=CITE.get(state["method"], "the model's own paper"))
