"""Models of the layers for Hugging Face transformers, and Llama-like models made linear.

Importing it registers the classes with AutoConfig, AutoModel, AutoModelForCausalLM and
AutoModelForSequenceClassification. Needs transformers 5.24 or later: ``pip install
".[transformers]"`` in the source tree.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from torch_spe.hf.cache import SPECache
from torch_spe.hf.configuration import SPEConfig
from torch_spe.hf.linearize import linearize, load_linearized
from torch_spe.hf.modeling import (
    SPEForCausalLM,
    SPEForSequenceClassification,
    SPEModel,
    SPEPreTrainedModel,
)

__all__ = [
    "SPECache",
    "SPEConfig",
    "SPEForCausalLM",
    "SPEForSequenceClassification",
    "SPEModel",
    "SPEPreTrainedModel",
    "linearize",
    "load_linearized",
]

AutoConfig.register(SPEConfig.model_type, SPEConfig, exist_ok=True)
AutoModel.register(SPEConfig, SPEModel, exist_ok=True)
AutoModelForCausalLM.register(SPEConfig, SPEForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(SPEConfig, SPEForSequenceClassification, exist_ok=True)
