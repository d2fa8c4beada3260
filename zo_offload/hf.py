"""All imports from transformers (5.17 and newer): no other module of the package imports it.

For a new release, read this list and then the modules that use changed names. Names that a user writes (a class in
config.json, a head) are looked up as attributes of `transformers`, which is also here. Each name is loaded at its first
use: a command that needs no model does not wait for transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_PUBLIC = (
    "AutoConfig", "AutoTokenizer", "EvalPrediction", "GenerationConfig", "OPTConfig", "PreTrainedModel",
    "TrainerControl", "TrainerState", "TrainingArguments", "get_scheduler",
)  # fmt: skip

# building and initialising models, renaming and converting weights, losses: may move with any release
_INTERNAL = {
    "get_model_conversion_mapping": "conversion_mapping",
    "PrefixChange": "core_model_loading",
    "WeightConverter": "core_model_loading",
    "WeightRenaming": "core_model_loading",
    "WeightTransform": "core_model_loading",
    "dot_natural_key": "core_model_loading",
    "rename_source_key": "core_model_loading",
    "get_class_from_dynamic_module": "dynamic_module_utils",
    "LOSS_MAPPING": "loss.loss_utils",
    "ForCausalLMLoss": "loss.loss_utils",
    "ForMaskedLMLoss": "loss.loss_utils",
    "get_gguf_hf_weights_map": "modeling_gguf_pytorch_utils",
    "TENSOR_PROCESSORS": "modeling_gguf_pytorch_utils",
    "TensorProcessor": "modeling_gguf_pytorch_utils",
    "get_reporting_integration_callbacks": "integrations.integration_utils",
    "patch_output_recorders": "monkey_patching",
}
_MODULES = {"transformers": "", "initialization": ".initialization", "modeling_auto": ".models.auto.modeling_auto"}

if TYPE_CHECKING:
    import transformers as transformers
    from transformers import AutoConfig as AutoConfig
    from transformers import AutoTokenizer as AutoTokenizer
    from transformers import EvalPrediction as EvalPrediction
    from transformers import GenerationConfig as GenerationConfig
    from transformers import OPTConfig as OPTConfig
    from transformers import PreTrainedModel as PreTrainedModel
    from transformers import TrainerControl as TrainerControl
    from transformers import TrainerState as TrainerState
    from transformers import TrainingArguments as TrainingArguments
    from transformers import get_scheduler as get_scheduler
    from transformers import initialization as initialization
    from transformers.conversion_mapping import get_model_conversion_mapping as get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange as PrefixChange
    from transformers.core_model_loading import WeightConverter as WeightConverter
    from transformers.core_model_loading import WeightRenaming as WeightRenaming
    from transformers.core_model_loading import WeightTransform as WeightTransform
    from transformers.core_model_loading import dot_natural_key as dot_natural_key
    from transformers.core_model_loading import rename_source_key as rename_source_key
    from transformers.dynamic_module_utils import get_class_from_dynamic_module as get_class_from_dynamic_module
    from transformers.integrations.integration_utils import (
        get_reporting_integration_callbacks as get_reporting_integration_callbacks,
    )
    from transformers.loss.loss_utils import LOSS_MAPPING as LOSS_MAPPING
    from transformers.loss.loss_utils import ForCausalLMLoss as ForCausalLMLoss
    from transformers.loss.loss_utils import ForMaskedLMLoss as ForMaskedLMLoss
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS as TENSOR_PROCESSORS
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor as TensorProcessor
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map as get_gguf_hf_weights_map
    from transformers.models.auto import modeling_auto as modeling_auto
    from transformers.monkey_patching import patch_output_recorders as patch_output_recorders


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"transformers{_MODULES[name]}")
    if name in _INTERNAL:
        return getattr(import_module(f"transformers.{_INTERNAL[name]}"), name)
    if name in _PUBLIC:
        return getattr(import_module("transformers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
