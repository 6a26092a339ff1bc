"""One file per concern, in the room of its process; docstrings say why there, and until when."""

from ...cpu.hooks import HOOKS as CPU_HOOKS
from ...engine.hooking import Hook, Symbol
from . import http, model, scheduler
from .model import FORCING_HOOKS

HOOKS: tuple[Hook, ...] = (*http.HOOKS, *scheduler.HOOKS, *model.HOOKS)

_MOE = "sglang.srt.layers.moe"
_MANAGERS = "sglang.srt.managers"
_HTTP = "sglang.srt.entrypoints.http_server"
_RUNNER = "sglang.srt.model_executor"

RELIED_ON: tuple[Symbol, ...] = (
    # routers and experts of a loaded model
    Symbol(f"{_MOE}.topk.TopK", "topk_config layer_id"),
    Symbol(
        f"{_MOE}.topk.TopKConfig",
        "top_k use_grouped_topk topk_group num_expert_group renormalize custom_routing_function "
        "correction_bias scoring_func routed_scaling_factor output_format fused_gate_packed_ids "
        "apply_routed_scaling_factor_on_output",
    ),
    Symbol(f"{_MOE}.topk.TopKOutputFormat", "STANDARD"),
    Symbol(f"{_MOE}.hash_topk.HashTopK"),
    Symbol(
        f"{_MOE}.fused_moe_triton.layer.FusedMoE",
        "layer_id is_shared_fused_moe num_experts num_fused_shared_experts moe_ep_size "
        "quant_method runner moe_runner_config",
    ),
    Symbol(f"{_MOE}.fused_moe_triton.layer.FusedMoE.run_moe_core"),
    Symbol(f"{_MOE}.moe_runner.runner.MoeRunner", "fused_func runner_core runner_backend"),
    Symbol(
        f"{_MOE}.moe_runner.base.MoeRunnerConfig",
        "is_gated activation apply_router_weight_on_input top_k swiglu_limit gemm1_alpha "
        "gemm1_beta gemm1_clamp_limit gate_up_interleaved no_combine",
    ),
    Symbol(f"{_MOE}.utils.get_moe_runner_backend"),
    Symbol(f"{_MOE}.utils.MoeRunnerBackend"),
    Symbol("sglang.srt.layers.quantization.unquant.UnquantizedFusedMoEMethod"),
    Symbol("sglang.srt.runtime_context.get_exec"),
    Symbol("sglang.srt.state_capturer.routed_experts.get_global_experts_capturer"),
    # batches and forwards
    Symbol(
        f"{_MANAGERS}.schedule_batch.ScheduleBatch",
        "forward_mode reqs extend_lens decoding_reqs beam_tail seq_lens_cpu",
    ),
    Symbol(
        f"{_MANAGERS}.schedule_batch.Req",
        "rid session cache_salt sampling_params origin_input_ids",
    ),
    Symbol(f"{_MANAGERS}.schedule_batch.Req.set_finish_with_abort"),
    Symbol(f"{_RUNNER}.forward_batch_info.ForwardBatch", "batch_size"),
    Symbol(f"{_RUNNER}.forward_batch_info.ForwardMode", "is_decode is_extend is_mixed"),
    Symbol(
        f"{_RUNNER}.model_runner.ModelRunner",
        "is_draft_worker server_args device model model_config",
    ),
    Symbol(f"{_RUNNER}.model_runner.ModelRunnerOutput", "can_run_graph"),
    Symbol(f"{_RUNNER}.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner", "model_runner"),
    Symbol(
        "sglang.srt.layers.logits_processor.LogitsProcessorOutput",
        "next_token_logits customized_info",
    ),
    # requests and answers
    Symbol("sglang.srt.sampling.sampling_params.SamplingParams", "custom_params"),
    Symbol(f"{_MANAGERS}.io_struct.GenerateReqInput", "sampling_params text input_ids rid"),
    Symbol(
        f"{_MANAGERS}.tokenizer_manager.TokenizerManager",
        "preferred_sampling_params served_model_name",
    ),
    Symbol(f"{_MANAGERS}.tokenizer_control_mixin.TokenizerControlMixin.set_internal_state"),
    Symbol(f"{_MANAGERS}.io_struct.GetInternalStateReqOutput", "internal_state"),
    Symbol(f"{_MANAGERS}.io_struct.SetInternalStateReqOutput"),
    Symbol(f"{_HTTP}.app"),
    Symbol(f"{_HTTP}._global_state"),
    Symbol("sglang.srt.utils.auth.auth_level"),
    # updates of weights
    Symbol(
        f"{_MANAGERS}.scheduler_components.weight_updater.SchedulerWeightUpdaterManager",
        "_session tp_worker scheduler",
    ),
    Symbol(f"{_MANAGERS}.io_struct.UpdateWeightFromDiskReqOutput"),
    Symbol(f"{_MANAGERS}.io_struct.UpdateWeightsFromIPCReqOutput"),
    Symbol(f"{_MANAGERS}.io_struct.BeginWeightUpdateReqOutput"),
    Symbol(f"{_MANAGERS}.io_struct.CheckWeightsReqOutput"),
    # processes, ranks, flags and platforms
    Symbol("sglang.srt.runtime_context.get_serving"),
    Symbol("sglang.srt.distributed.get_tp_group"),
    Symbol("sglang.srt.arg_groups.model_override_base.resolved_view"),
    Symbol("sglang.srt.platforms.current_platform"),
    Symbol("sglang.srt.platforms.cuda.CudaSRTPlatform"),
    # the portable CPU platform
    Symbol("sglang.kernels.fused_op.BaseFusedOp.register_oot_forward"),
    Symbol("sglang.srt.mem_cache.pool_host.common.ALLOC_MEMORY_FUNCS"),
    Symbol("sglang.srt.mem_cache.pool_host.base.HostKVCache", "pin_memory"),
    Symbol("sglang.srt.mem_cache.pool_host.mha"),
    Symbol("sglang.srt.mem_cache.pool_host.mla"),
    Symbol(
        "sglang.srt.models.deepseek_common.attention_backend_handler."
        "AttentionBackendRegistry.register"
    ),
)
"""Functions and classes that are called or read but not hooked, with what is read of them."""


def entries() -> list[Hook | Symbol]:
    """Everything of SGLang that any process of ours hooks or relies on."""
    return [*HOOKS, *FORCING_HOOKS, *CPU_HOOKS, *RELIED_ON]


__all__ = ["FORCING_HOOKS", "HOOKS", "RELIED_ON", "entries", "http", "model", "scheduler"]
