"""Every route of SGLang's HTTP app, by what it does with a policy. No tests."""

from __future__ import annotations

from typing import Any

MESSAGES = [{"role": "user", "content": "In the beginning"}]

GENERATES: dict[str, dict[str, Any]] = {
    "/generate": {"text": "The", "sampling_params": {"max_new_tokens": 2}},
    "/v1/completions": {"model": "demo", "prompt": "The", "max_tokens": 2},
    "/v1/chat/completions": {"model": "demo", "messages": MESSAGES, "max_tokens": 2},
    "/invocations": {"model": "demo", "messages": MESSAGES, "max_tokens": 2},
    "/v1/responses": {"model": "demo", "input": "The", "max_output_tokens": 2},
    "/v1/messages": {"model": "demo", "messages": MESSAGES, "max_tokens": 2},
    "/api/generate": {"model": "demo", "prompt": "The", "options": {"num_predict": 2}},
    "/api/chat": {"model": "demo", "messages": MESSAGES, "options": {"num_predict": 2}},
    "/vertex_generate": {
        "instances": [{"text": "The"}],
        "parameters": {"sampling_params": {"max_new_tokens": 2}},
    },
    "/v1/score": {"model": "demo", "query": "The", "items": ["a"], "label_token_ids": [1, 2]},
    "/v1/systemone": {
        "model": "demo",
        "state": "The",
        "questions": {"a": {"type": "choice", "criteria": {"yes": "a", "no": "b"}}},
    },
}
"""Routes that run a policy for the demo model, with a small request."""

OTHER_MODELS: dict[str, dict[str, Any]] = {
    "/v1/rerank": {"query": "The", "documents": ["a", "b"]},
    "/v1/decisions": {
        "model": "demo",
        "input": "The",
        "questions": [{"id": "a", "type": "yes_no", "question": "Is it?"}],
    },
}
"""Routes that run a policy for models of another kind; here they only refuse."""

AUDIO = {"/v1/audio/transcriptions", "/v1/realtime"}
"""Routes that run a policy for models that hear, with bodies that are no JSON objects."""

EMBEDS = {"/encode", "/classify", "/v1/embeddings", "/v1/classify"}
"""Routes that run the model without a choice of policy."""

SILENT = {
    "/",
    "/abort_request",
    "/add_external_corpus",
    "/api/show",
    "/api/tags",
    "/begin_weight_update",
    "/close_session",
    "/configure_logging",
    "/continue_generation",
    "/destroy_weights_update_group",
    "/detokenize",
    "/docs",
    "/docs/oauth2-redirect",
    "/dump_expert_distribution_record",
    "/end_weight_update",
    "/flush_cache",
    "/freeze_gc",
    "/get_hicache_l3_cache_layout",
    "/get_model_info",
    "/get_remote_instance_transfer_engine_info",
    "/get_server_info",
    "/get_weights_by_name",
    "/health",
    "/health_generate",
    "/hicache/storage-backend",
    "/hicache/storage-backend/clear",
    "/init_weights_send_group_for_remote_instance",
    "/init_weights_update_group",
    "/is_scaling_elastic_ep",
    "/list_external_corpora",
    "/load_lora_adapter",
    "/load_lora_adapter_from_tensors",
    "/model_info",
    "/open_session",
    "/openapi.json",
    "/parse_function_call",
    "/pause_generation",
    "/pd_role_switch",
    "/ping",
    "/ready",
    "/redoc",
    "/release_memory_occupation",
    "/remote_instance_transfer_engine_info",
    "/remove_external_corpus",
    "/resume_memory_occupation",
    "/scale_elastic_ep",
    "/send_weights_to_remote_instance",
    "/separate_reasoning",
    "/server_info",
    "/set_internal_state",
    "/set_trace_level",
    "/slow_down",
    "/start_expert_distribution_record",
    "/start_profile",
    "/stop_expert_distribution_record",
    "/stop_profile",
    "/tokenize",
    "/unload_lora_adapter",
    "/update_weight_version",
    "/update_weights_from_disk",
    "/update_weights_from_distributed",
    "/update_weights_from_ipc",
    "/update_weights_from_tensor",
    "/v1/detokenize",
    "/v1/loads",
    "/v1/messages/count_tokens",
    "/v1/models",
    "/v1/models/{model:path}",
    "/v1/responses/{response_id}",
    "/v1/responses/{response_id}/cancel",
    "/v1/tokenize",
    "/weights_checker",
}
"""Routes that run no request of a client."""
