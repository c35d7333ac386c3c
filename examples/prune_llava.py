"""Drop visual tokens from a LLaVA: what is kept, how long the cache gets, and that nothing changes when all are kept.

python examples/prune_llava.py                    a random LLaVA, which the tokens mean nothing to
python examples/prune_llava.py FOLDER image.png   a LLaVA-1.5 that you have, about an image of yours
"""

import sys

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig

import mmkernels

torch.manual_seed(0)
if len(sys.argv) > 2:
    from PIL import Image

    model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
    processor = AutoProcessor.from_pretrained(sys.argv[1])
    prompt = "USER: <image>\nWhat is shown? ASSISTANT:"
    inputs = processor(images=Image.open(sys.argv[2]), text=prompt, return_tensors="pt")
else:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, image_size=64, patch_size=8)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**sizes, vocab_size=128), image_token_index=99)
    model = AutoModelForImageTextToText.from_config(config)
    ids = torch.tensor([[1, 5, *[99] * 64, 7, 8, 9]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 64, 64)}
model.eval()

with torch.no_grad():
    whole = model(**inputs).logits
    for name, options in (("vtc_cls", {"keep_ratio": 1.0}), ("vtc_cls", {"num_keep": 9}), ("fastv", {"num_keep": 9})):
        with mmkernels.prune(model, name, **options) as handle:
            out = model(**inputs, use_cache=True)
            text = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        lengths = [layer.keys.shape[2] for layer in out.past_key_values.layers]
        same = ", the same bits" if torch.equal(out.logits, whole) else ""
        print(f"{name} {options}: cached tokens by layer {lengths}{same}")
        kept = [patches.tolist()[:9] for patches in handle.kept] or "chosen anew in the decoder"
        print(f"  first kept patches: {kept}; generate returned {text.shape[1]} ids, every placeholder among them")
