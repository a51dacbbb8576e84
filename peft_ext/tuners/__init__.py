"""Adapters for any model: configurations, injection, training state, checkpoints.

One file per method (``lora.py``); names and meaning are Hugging Face PEFT's.
"""

from peft_ext.tuners.adapter_drop import AdapterDrop
from peft_ext.tuners.bitfit import BitFitConfig, BitFitModel
from peft_ext.tuners.compacter import CompacterConfig, CompacterPlusPlusConfig
from peft_ext.tuners.config import PeftConfig, PeftType, TaskType
from peft_ext.tuners.fusion import AdapterFusionConfig, AdapterFusionModel
from peft_ext.tuners.hidden_prompt import HiddenPromptConfig, HiddenPromptModel
from peft_ext.tuners.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_ext.tuners.houlsby import HoulsbyConfig, HoulsbyModel
from peft_ext.tuners.lokr import LoKrConfig
from peft_ext.tuners.lora import LoraConfig, LoraModel
from peft_ext.tuners.merge_report import MergeReport
from peft_ext.tuners.model import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_peft_model,
)
from peft_ext.tuners.p_tuning import PromptEncoderConfig, PromptEncoderModel, PromptEncoderReparameterizationType
from peft_ext.tuners.pfeiffer import PfeifferConfig, PfeifferModel
from peft_ext.tuners.prefix_tuning import PrefixTuningConfig, PrefixTuningModel
from peft_ext.tuners.prompt_tuning import PromptTuningConfig, PromptTuningInit, PromptTuningModel
from peft_ext.tuners.quantize import QuantizationReport, QuantizedWeight, quantize_base
from peft_ext.tuners.side import SIDE_NETWORKS, SideTuningConfig, SideTuningModel
from peft_ext.tuners.state_dict import get_peft_model_state_dict, set_peft_model_state_dict

__all__ = [
    "SIDE_NETWORKS",
    "AdapterDrop",
    "AdapterFusionConfig",
    "AdapterFusionModel",
    "BitFitConfig",
    "BitFitModel",
    "CompacterConfig",
    "CompacterPlusPlusConfig",
    "HiddenPromptConfig",
    "HiddenPromptModel",
    "HoulsbyConfig",
    "HoulsbyModel",
    "LoKrConfig",
    "LoraConfig",
    "LoraModel",
    "MergeReport",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PfeifferConfig",
    "PfeifferModel",
    "PrefixTuningConfig",
    "PrefixTuningModel",
    "PromptEncoderConfig",
    "PromptEncoderModel",
    "PromptEncoderReparameterizationType",
    "PromptTuningConfig",
    "PromptTuningInit",
    "PromptTuningModel",
    "QuantizationReport",
    "QuantizedWeight",
    "SideTuningConfig",
    "SideTuningModel",
    "TaskType",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "prepare_model_for_compiled_hotswap",
    "quantize_base",
    "set_peft_model_state_dict",
]
