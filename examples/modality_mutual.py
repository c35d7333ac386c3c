"""Make a decoder modality-mutual: its image tokens read the question that follows them.

python examples/modality_mutual.py                                    a random Llama
python examples/modality_mutual.py HuggingFaceTB/SmolLM2-135M-Instruct   any Llama, Qwen2, Phi-3, ... you have
"""

import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mmkernels import build_mutual_spans, mma_mask
from mmkernels.interop import make_modality_mutual

torch.manual_seed(0)
if len(sys.argv) > 1:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
else:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_key_value_heads=2, **sizes))

image, tag = 9, 3  # the placeholder of an image token, and the token after which the answer starts
prompt = torch.tensor([[1, 50, *[image] * 8, 60, 61, 62, 63, tag]])
other = prompt.clone()
other[0, 12] = 99  # another question about the same image

make_modality_mutual(model.eval(), image_token_id=image, prompt_end_token_id=tag)
print(mma_mask(15, spans=build_mutual_spans(prompt, image_token_id=image, prompt_end_token_id=tag)).draw())
with torch.no_grad():
    states = [model(ids, output_hidden_states=True).hidden_states[-1][0, 2:10] for ids in (prompt, other)]
change = (states[0] - states[1]).norm() / states[0].norm()
print(f"another question changes the image tokens' last states by {100 * change:.1f} % (causal attention: 0 %)")
print("generated:", model.generate(prompt, max_new_tokens=8, do_sample=False)[0, 15:].tolist())
