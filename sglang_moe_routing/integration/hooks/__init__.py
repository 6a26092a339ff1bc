"""One file per concern, in the room of its process; docstrings say why there, and until when."""

from ...engine.hooking import Hook, Symbol
from . import http, model, scheduler
from .model import FORCING_HOOKS

HOOKS: tuple[Hook, ...] = (*http.HOOKS, *scheduler.HOOKS, *model.HOOKS)

RELIED_ON: tuple[Symbol, ...] = (
    Symbol("sglang.srt.layers.moe.topk.TopK"),
    Symbol("sglang.srt.layers.moe.topk.TopKConfig"),
    Symbol("sglang.srt.layers.moe.topk.TopKOutputFormat"),
    Symbol("sglang.srt.layers.moe.hash_topk.HashTopK"),
    Symbol("sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE"),
    Symbol("sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE.run_moe_core"),
    Symbol("sglang.srt.layers.moe.utils.get_moe_runner_backend", ()),
    Symbol("sglang.srt.runtime_context.get_exec", ()),
    Symbol("sglang.srt.state_capturer.routed_experts.get_global_experts_capturer", ()),
    Symbol(
        "sglang.srt.managers.schedule_batch.Req.set_finish_with_abort",
        ("self", "error_msg", "status_code", "err_type"),
    ),
    Symbol("sglang.srt.sampling.sampling_params.SamplingParams.custom_params"),
    Symbol("sglang.srt.entrypoints.http_server.app"),
    Symbol("sglang.srt.entrypoints.http_server._global_state"),
    Symbol(
        "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin.set_internal_state",
        ("self", "obj"),
    ),
    Symbol("sglang.srt.managers.io_struct.SetInternalStateReqOutput"),
    Symbol(
        "sglang.srt.managers.scheduler_components.weight_updater."
        "SchedulerWeightUpdaterManager._session"
    ),
    Symbol("sglang.srt.runtime_context.get_serving", ()),
    Symbol("sglang.srt.utils.auth.auth_level", ("level",)),
    Symbol("sglang.srt.distributed.get_tp_group", ()),
    Symbol("sglang.srt.arg_groups.model_override_base.resolved_view", ("server_args",)),
    Symbol("sglang.srt.platforms.current_platform"),
    Symbol("sglang.srt.platforms.cuda.CudaSRTPlatform"),
    Symbol("sglang.kernels.fused_op.BaseFusedOp.register_oot_forward"),
    Symbol("sglang.srt.layers.quantization.unquant.UnquantizedFusedMoEMethod"),
    Symbol("sglang.srt.mem_cache.pool_host.common.ALLOC_MEMORY_FUNCS"),
    Symbol("sglang.srt.mem_cache.pool_host.base.HostKVCache"),
    Symbol("sglang.srt.mem_cache.pool_host.mha"),
    Symbol("sglang.srt.mem_cache.pool_host.mla"),
    Symbol(
        "sglang.srt.models.deepseek_common.attention_backend_handler.AttentionBackendRegistry.register"
    ),
)

__all__ = ["FORCING_HOOKS", "HOOKS", "RELIED_ON", "http", "model", "scheduler"]
