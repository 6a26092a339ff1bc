"""Settings of SGLang 0.5.23 that leave the routing alone, grouped by why.

Those that touch MoE layers, routers, graphs or batches were followed in the source; the others were
placed by what their help and the code that reads them say.
"""

from __future__ import annotations

from collections.abc import Mapping

NEUTRAL_FLAGS: Mapping[str, str] = {
    "which weights are loaded, and how": """
        checkpoint_engine_wait_weights_before_ready decrypted_config_file
        decrypted_draft_config_file delete_ckpt_after_loading dtype engine_info_bootstrap_port
        is_embedding kv_cache_dtype model_checksum model_config_parser
        model_loader_extra_config modelexpress_config modelopt_checkpoint_restore_path
        modelopt_checkpoint_save_path modelopt_export_path modelopt_quant qsa_indexer_dtype
        quantization_param_path quantize_and_serve remote_instance_weight_loader_backend
        remote_instance_weight_loader_seed_instance_ip
        remote_instance_weight_loader_seed_instance_service_port
        remote_instance_weight_loader_send_weights_group_ports
        remote_instance_weight_loader_start_seed_via_transfer_engine rl_quant_profile
        startup_weight_load_mode weight_cache_mode weight_cache_socket weight_cache_timeout
        weight_loader_disable_mmap weight_loader_drop_cache_after_load
        weight_loader_prefetch_checkpoints weight_loader_prefetch_num_threads
    """,
    "requests, answers and tokenizers; none of them decides about experts": """
        allow_auto_truncate asr_max_buffer_seconds asr_max_concurrent_sessions batch_notify_size
        chat_template completion_template constrained_json_disable_any_whitespace
        constrained_json_max_whitespace_cnt constrained_json_whitespace_pattern
        default_chat_template_kwargs detokenizer_worker_num disable_tokenizer_batch_decode
        dynamic_batch_tokenizer_batch_size dynamic_batch_tokenizer_batch_timeout enable_cache_report
        enable_dynamic_batch_tokenizer enable_http_worker_reuseport enable_response_store
        enable_ssl_refresh enable_strict_thinking enable_tokenizer_batch_encode file_storage_path
        grpc_response_timeout_secs grpc_worker_threads hf_chat_template_name host
        http2_initial_connection_window_size http2_max_concurrent_streams
        incremental_streaming_output port reasoning_parser
        return_input_ids return_output_ids sampling_defaults sidecar_args skip_server_warmup
        skip_tokenizer_init ssl_ca_certs ssl_certfile ssl_keyfile ssl_keyfile_password
        stream_interval stream_response_default_include_usage strip_thinking_cache tokenizer_backend
        tokenizer_mode tokenizer_path tool_call_parser tool_server trust_request_chat_template
        weight_version
    """,
    "inputs other than text": """
        allowed_media_domains disable_fast_image_processor enable_broadcast_mm_inputs_process
        enable_mm_global_cache enable_multimodal enable_prefix_mm_cache image_processor_backend
        limit_mm_data_per_request media_url_max_file_size_mb mm_attention_backend
        mm_enable_dp_encoder mm_feature_transport mm_global_cache_backend mm_io_worker_num
        mm_preprocess_cache_size_mb mm_process_config mm_processor_worker_num
        trust_mm_content_hashes
    """,
    "logits, hidden states and memory, beside the experts": """
        aux_hidden_state_capture disable_outlines_disk_cache enable_draft_weights_cpu_backup
        enable_fp32_lm_head enable_memory_saver enable_mis enable_return_aux_hidden_states
        enable_return_hidden_states enable_return_indexer_topk enable_tf32_matmul enable_watermark
        enable_weights_cpu_backup return_aux_hidden_state_layer_ids return_hidden_states_mode
        sampling_mask_max_tokens watermark_config watermark_context_window watermark_default_enabled
        watermark_enforce_all watermark_key watermark_key_b watermark_max_probability
        watermark_mixing_probability
    """,
    "which requests run together, whatever their policies": """
        _swa_full_tokens_ratio_explicitly_set abort_on_priority_when_disabled c128_page_size
        default_priority_value disable_chunked_prefix_cache disable_hybrid_swa_memory
        disable_overlap_schedule disable_priority_preemption enable_dynamic_chunking
        enable_prefill_delayer enable_priority_scheduling mamba_full_memory_ratio
        max_mamba_cache_size max_queued_requests max_running_requests max_total_tokens
        mem_fraction_static min_free_slots_delay num_continuous_decode_steps page_size
        prefill_decode_interval prefill_decode_interval_min_bs
        prefill_delayer_forward_passes_buckets prefill_delayer_max_delay_ms
        prefill_delayer_max_delay_passes prefill_delayer_queue_min_ratio
        prefill_delayer_token_usage_low_watermark prefill_delayer_wait_seconds_buckets
        prefill_max_requests prefill_only_disable_kv_cache priority_scheduling_preemption_threshold
        retraction_policy schedule_conservativeness schedule_low_priority_values_first
        schedule_policy scheduler_recv_interval swa_full_tokens_ratio swa_prefix_tails
    """,
    "where KV is kept": """
        _radix_eviction_policy_explicitly_set enable_hisparse enable_linker_mla_dedup
        enable_page_major_kv_layout enable_session_radix_cache enable_unified_memory
        flexkv_config_file hicache_host_memory_fraction hicache_host_memory_mode hicache_io_backend
        hicache_mem_layout hicache_ratio hicache_size hicache_storage_backend_extra_config
        hicache_storage_prefetch_policy hicache_storage_prefetch_retry_max_attempts
        hicache_storage_prefetch_retry_poll_interval hicache_write_policy hisparse_config
        lmcache_config_file radix_eviction_policy radix_eviction_policy_config
        unified_cache_external_linker_backend unified_cache_external_linker_config
    """,
    "processes, links, and ways to shard what is not refused above": """
        cp_strategy dcp_comm_backend dcp_replicate_q_proj disable_attn_tp_gather dist_init_addr
        dist_timeout elastic_ep_initial_size enable_cp_decode_attn_tp enable_cp_tp_group_sharing
        enable_dense_mlp_attn_tp enable_dp_attention_local_control_broadcast enable_dp_lm_head
        enable_dsa_cache_layer_split enable_kv_cache_sharding enable_p2p_check
        enable_shared_experts_attn_tp enable_tp_lm_head_all_to_all ep_join_rank_offset
        gated_launch_port max_ep_size moe_dense_tp_size nccl_port pp_async_batch_depth
        pp_max_micro_batch_size shared_experts_tp_size
    """,
    "devices and processes": """
        base_gpu_id gc_threshold gpu_id_step mlx_enable_sampling numa_node random_seed sleep_on_idle
        soft_watchdog_timeout watchdog_timeout
    """,
    "logs, metrics and traces": """
        bucket_e2e_request_latency bucket_inter_token_latency bucket_time_to_first_token
        crash_dump_folder debug_tensor_dump_input_file debug_tensor_dump_layers
        debug_tensor_dump_output_folder decode_log_interval enable_forward_pass_metrics
        enable_metrics_for_all_schedulers enable_mfu_metrics enable_request_time_stats_logging
        enable_trace export_metrics_to_file export_metrics_to_file_dir extra_metric_labels
        forward_pass_metrics_ipc_name forward_pass_metrics_worker_id gc_warning_threshold_secs
        generation_tokens_buckets kv_canary kv_canary_real_data kv_canary_sweep_interval
        load_publish_endpoint load_snapshot_publish_interval log_level log_level_http log_requests
        log_requests_format log_requests_level log_requests_target msprobe_dump_config
        otlp_service_name otlp_traces_endpoint prompt_tokens_buckets show_time_cost
        smg_http_sidecar_port stat_loggers tokenizer_metrics_allowed_custom_labels
        tokenizer_metrics_custom_labels_header trace_modules uvicorn_access_log_exclude_prefixes
    """,
    "attention, sampling and matrix products": """
        attention_backend bf16_gemm_backend decode_attention_backend disable_flashinfer_autotune
        dsa_decode_backend dsa_paged_mqa_logits_backend dsa_prefill_backend dsa_topk_backend
        dsa_triton_union dsv4_attn_backend dsv4_prefill_backend enable_deepseek_v4_fp4_indexer
        enable_dsa_fused_indexer enable_fused_qk_norm_rope enable_lean_attention
        enable_precise_embedding_interpolation flashinfer_autotune_skip_ops
        flashinfer_mla_disable_ragged fp4_gemm_runner_backend fp8_gemm_runner_backend
        grammar_backend prefill_attention_backend prefill_kv_cache_dequant_dtype sampling_backend
        triton_attention_num_kv_splits triton_attention_reduce_in_fp32
        triton_attention_split_tile_size
    """,
    "state space layers": """
        enable_int8_mamba_checkpoint enable_linear_replayssm enable_linear_replayssm_spec
        enable_mamba_cache_stochastic_rounding int8_mamba_ckpt_size linear_attn_backend
        linear_attn_decode_backend linear_attn_prefill_backend linear_attn_verify_backend
        linear_replayssm_cache_len mamba_backend mamba_cache_philox_rounds mamba_max_states_per_path
        mamba_radix_cache_strategy mamba_ssm_dtype mamba_track_interval uses_mamba_radix_cache
    """,
    "details of graphs and of the refused torch.compile": """
        enable_cudagraph_gc enable_profile_cuda_graph enable_torch_compile_debug_mode
        torch_compile_max_bs
    """,
    "how ranks add and exchange hidden states": """
        boundary_reduction disable_aiter_allreduce_fusion_in_decode
        disable_aiter_allreduce_fusion_in_prefill disable_custom_all_reduce
        enable_aiter_allreduce_fusion enable_flashinfer_allreduce_fusion
        enable_layerwise_nvtx_marker enable_mscclpp enable_nccl_nvls enable_quant_communications
        enable_scattered_sconv enable_symm_mem enable_torch_symm_mem
        enforce_disable_flashinfer_allreduce_fusion flashinfer_allreduce_fusion_backend
        pre_warm_nccl
    """,
    "details of refused all-to-all and elastic expert parallelism; records of what was routed": """
        deepep_config deepep_dispatcher_output_dtype deepep_mode deepep_v2_mode
        disable_flashinfer_cutlass_moe_fp4_allgather elastic_ep_scale_timeout
        enable_w4a4_mxfp4_megamoe eplb_algorithm eplb_min_rebalancing_utilization_threshold
        eplb_rebalance_layers_per_chunk eplb_rebalance_num_iterations
        expert_balancedness_report_mode expert_distribution_recorder_buffer_size
        expert_distribution_recorder_mode flashinfer_a2a_dispatch_type fuseep_mode
        mooncake_ib_device
    """,
    "details of refused speculative decoding": """
        _speculative_draft_quantization_explicitly_set enable_multi_layer_eagle spec_trace_dir
        speculative_accept_threshold_acc speculative_accept_threshold_single speculative_adaptive
        speculative_adaptive_config speculative_attention_mode speculative_boundary_reduction
        speculative_dflash_block_size speculative_domino_candidate_pool_size
        speculative_draft_attention_backend speculative_draft_kv_cache_dtype
        speculative_draft_load_format speculative_draft_model_path
        speculative_draft_model_quantization speculative_draft_model_revision
        speculative_draft_sink_size speculative_draft_window_size speculative_dsa_topk_backend
        speculative_dspark_align_verify_tokens_to_graph_tier speculative_dspark_block_size
        speculative_dspark_confidence_sts_path speculative_dspark_sps_table_path
        speculative_eagle_topk speculative_enable_w4a4_mxfp4_megamoe speculative_moe_a2a_backend
        speculative_moe_runner_backend speculative_ngram_capacity
        speculative_ngram_external_corpus_max_tokens speculative_ngram_external_corpus_path
        speculative_ngram_external_sam_budget speculative_ngram_match_type
        speculative_ngram_max_bfs_breadth speculative_ngram_max_trie_depth
        speculative_ngram_min_bfs_breadth speculative_num_draft_tokens speculative_num_steps
        speculative_token_map speculative_use_block_verification speculative_use_rejection_sampling
        uno_lora_path
    """,
    "details of refused PD disaggregation; encoders": """
        decoupled_spec_bind_endpoint decoupled_spec_connect_endpoints decoupled_spec_rank
        disaggregation_bootstrap_port disaggregation_decode_allocation_policy
        disaggregation_decode_enable_offload_kvcache disaggregation_decode_enable_radix_cache
        disaggregation_decode_extra_slots disaggregation_decode_host_receive_threshold
        disaggregation_decode_polling_interval disaggregation_decode_retraction_backup
        disaggregation_enable_kv_checksum disaggregation_ib_device disaggregation_transfer_backend
        enable_adaptive_dispatch_to_encoder enable_pd_role_switch encoder_bootstrap_port
        encoder_only encoder_register_urls encoder_transfer_backend encoder_urls language_model_only
        language_only num_reserved_decode_tokens optimistic_prefill_attempts pdmux_config_path
        sm_group_num
    """,
    "adapters: how they are kept and computed": """
        enable_lora_overlap_loading lora_backend lora_drain_wait_threshold lora_eviction_policy
        lora_strict_loading lora_target_modules max_loaded_loras max_lora_chunk_size max_lora_rank
        max_loras_per_batch
    """,
    "details of refused overlap": """
        tbo_token_distribution_threshold
    """,
    "where weights are kept": """
        cpu_offload_gb offload_group_size offload_mode offload_num_in_group offload_prefetch_step
        ple_offload_backend ple_offload_dir ple_offload_embedding
    """,
    "details of refused diffusion models": """
        dllm_algorithm_config dllm_fdfo
    """,
    "numerics of training": """
        rl_on_policy_target
    """,
    "code of the operator, which this package does not judge": """
        custom_sigquit_handler custom_weight_loader forward_hooks warmups
    """,
}
"""Fields of `ServerArgs`."""

NEUTRAL_VARIABLES: Mapping[str, str] = {
    "platforms that are refused": """
        SGLANG_AITER_FUSE_RMSNORM_PAD SGLANG_AITER_K3_OPT SGLANG_AITER_MEGA_EPLB_FUSED_MAP_RECORD
        SGLANG_AITER_MEGA_EPLB_PREFILL_ONLY SGLANG_AITER_MEGA_RANK_SYNC
        SGLANG_AITER_MOE_SORTING_DISPATCH_POLICY SGLANG_AMD_FLYDSL_MEGA_MOE_DECODE_MTPR
        SGLANG_AMD_FLYDSL_MEGA_MOE_MTPR SGLANG_AMD_FLYDSL_MEGA_QUANT SGLANG_AMD_USE_FLYDSL_MEGA_MOE
        SGLANG_GFX1250_W4A8_BACKEND SGLANG_GFX1250_W4A8_KERNEL_GATHER SGLANG_HIP_SHARED_ACT_MXFP8
        SGLANG_M3_USE_AITER_FUSED_QKNORM SGLANG_MINIMAX_M3_FUSED_MOE_COMBINE
        SGLANG_MINIMAX_M3_FUSED_SWIGLU_MXFP8 SGLANG_MORI_COMBINE_DTYPE SGLANG_MORI_DISPATCH_DTYPE
        SGLANG_MORI_DISPATCH_INTER_KERNEL_SWITCH_THRESHOLD SGLANG_MORI_EP_V2
        SGLANG_MORI_MOE_MAX_INPUT_TOKENS SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK
        SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS SGLANG_MORI_RECV_BOUND
        SGLANG_NPU_ENABLE_SPARSE_KV_OFFLOAD SGLANG_NPU_FINE_GRAINED_MOE_DUAL_STREAM
        SGLANG_NPU_MOE_SITU_MXFP8_FUSED SGLANG_NPU_USE_MULTI_STREAM SGLANG_ROCM_K3_FUSE_KDA_INPROJ
        SGLANG_ROCM_K3_FUSE_KDA_INPROJ_MAX_TOKENS SGLANG_ROCM_K3_KDA_FUSED_BACKEND
        SGLANG_ROCM_USE_MULTI_STREAM SGLANG_USE_AITER_MOE_GU_ITLV SGLANG_ZBAL_LOCAL_MEM_SIZE
    """,
    "details of parallelism, speculation and disaggregation that are refused; records": """
        SGLANG_BACKUP_PORT_BASE SGLANG_BLACKWELL_OVERLAP_SHARED_EXPERTS_OUTSIDE_SBO
        SGLANG_DEEPEP_BF16_DISPATCH SGLANG_DEEPEP_LL_COMBINE_SEND_NUM_SMS
        SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK SGLANG_DEEPEP_V2_ENABLE_PREFILL_EXPAND
        SGLANG_DEEPEP_V2_NUM_MAX_DISPATCH_TOKENS_PER_RANK SGLANG_DEEPEP_V2_NUM_SMS
        SGLANG_DEEPEP_V2_TRACE_CONTIG SGLANG_DEEPEP_V2_TRACE_MASKED SGLANG_DISABLE_STATIC_WATERFILL
        SGLANG_DISAGG_STAGING_BUFFER SGLANG_DP_MASK_PAD_ROWS SGLANG_DP_RANK
        SGLANG_ENABLE_DP_SPEC_PREFILL_COORDINATION SGLANG_ENABLE_METRICS_DP_ATTENTION
        SGLANG_ENABLE_PP_SPEC SGLANG_ENABLE_QWEN_DEEPEP_SHARED_OVERLAP
        SGLANG_EPLB_HEATMAP_COLLECTION_INTERVAL SGLANG_EPLB_P2P_BATCH_CHUNK_SIZE
        SGLANG_EXPERIMENTAL_ONLINE_C128_MTP SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR
        SGLANG_EXPERT_LOCATION_UPDATER_CANARY SGLANG_EXPERT_LOCATION_UPDATER_LOG_INPUT
        SGLANG_EXPERT_LOCATION_UPDATER_LOG_METRICS SGLANG_FLASHINFER_MEGAMOE_COMBINE_DTYPE
        SGLANG_FLASHINFER_MEGAMOE_IN_KERNEL_FC2_REDUCE SGLANG_FLASHINFER_MEGAMOE_MAX_TOKENS_PER_RANK
        SGLANG_GLM_NEXTN_MOE_PTPC SGLANG_LOG_EXPERT_LOCATION_METADATA SGLANG_MOE_NVFP4_DISPATCH
        SGLANG_MOONCAKE_EP_NUM_MAX_DISPATCH_TOKENS_PER_RANK
        SGLANG_NCCL_ALL_GATHER_IN_OVERLAP_SCHEDULER_SYNC_BATCH SGLANG_NIXL_EP_BF16_DISPATCH
        SGLANG_NIXL_EP_NUM_MAX_DISPATCH_TOKENS_PER_RANK
        SGLANG_OPT_DEEPGEMM_MEGA_MOE_FUSE_SHARED_EXPERTS
        SGLANG_OPT_DEEPGEMM_MEGA_MOE_NUM_MAX_TOKENS_PER_RANK
        SGLANG_OPT_DEEPGEMM_MEGA_MOE_RESERVED_SMS SGLANG_OPT_DSV41_DSPARK_DRAFT_PREP_FORK
        SGLANG_OPT_DSV41_DSPARK_SKIP_PREFILLED_INPUTS SGLANG_OPT_DSV41_TARGET_METADATA_EARLY
        SGLANG_OPT_DSV41_TARGET_VERIFY_METADATA_GLUE SGLANG_OPT_MASK_DP_PAD_MOE
        SGLANG_OPT_SM120_MTP_ROUTER_TOP22 SGLANG_PPLX_NUM_MAX_DISPATCH_TOKENS_PER_RANK
        SGLANG_PP_COMM_OVERLAP SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP
        SGLANG_PP_SKIP_PURE_CHUNKED_OUTPUT_COMM SGLANG_RAGGED_VERIFY_MODE
        SGLANG_SCHEDULER_SKIP_ALL_GATHER SGLANG_SHARED_EXPERT_TP1 SGLANG_TBO_DEBUG
        SGLANG_TRACE_QWEN_MOE_DEEPEP_E2E SGLANG_USE_AG_AFTER_QLORA
    """,
    "queues, batches and processes, whatever the policies": """
        SGLANG_BATCH_TOKENIZER_OUTPUTS SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION
        SGLANG_DETOKENIZER_MAX_STATES SGLANG_DISABLE_CONSECUTIVE_PREFILL_OVERLAP
        SGLANG_DISABLE_HISPARSE_PREFETCH SGLANG_DYNAMIC_CHUNKING_SMOOTH_FACTOR
        SGLANG_EMBEDDINGS_SPARSE_HEAD SGLANG_EMPTY_CACHE_INTERVAL SGLANG_ENABLE_COLOCATED_BATCH_GEN
        SGLANG_ENABLE_DELAY_SAMPLE SGLANG_ENABLE_WAITING_PREFIX_REFRESH SGLANG_ENABLE_WAR_BARRIER
        SGLANG_ENCODER_DISPATCH_MIN_ITEMS SGLANG_EXACT_CHUNK_FILL
        SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE SGLANG_FLASHINFER_PREFILL_SPLIT_TILE_SIZE
        SGLANG_FORCE_COARSE_WAR_BARRIER SGLANG_FORCE_STREAM_INTERVAL SGLANG_INIT_NEW_TOKEN_RATIO
        SGLANG_KILLPG_ON_SCHEDULER_EXCEPTION SGLANG_LOAD_SNAPSHOT_USE_ZMQ
        SGLANG_MAX_NEW_TOKENS_LIMIT SGLANG_MIN_NEW_TOKEN_RATIO_FACTOR SGLANG_MM_BUFFER_SIZE_MB
        SGLANG_MM_PRECOMPUTE_HASH SGLANG_NEW_TOKEN_RATIO_DECAY_STEPS SGLANG_NUMA_BIND_V2
        SGLANG_OPT_RELEASE_PREFILL_SWA SGLANG_PREFILL_DELAYER_MAX_PREFILL_BS_WINDOW_SIZE
        SGLANG_PREFILL_TILE_BUDGET SGLANG_PREFILL_TILE_BUDGET_MODE SGLANG_RADIX_FORCE_MISS
        SGLANG_REQUEST_STATE_WAIT_TIMEOUT SGLANG_REQ_RUNNING_TIMEOUT SGLANG_REQ_WAITING_TIMEOUT
        SGLANG_RETRACT_DECODE_STEPS SGLANG_SCHEDULER_MAX_RECV_PER_POLL
        SGLANG_SCHEDULER_RECV_SKIPPER_WEIGHT_DECODE SGLANG_SCHEDULER_RECV_SKIPPER_WEIGHT_DEFAULT
        SGLANG_SCHEDULER_RECV_SKIPPER_WEIGHT_NONE SGLANG_SCHEDULER_RECV_SKIPPER_WEIGHT_TARGET_VERIFY
        SGLANG_SET_CPU_AFFINITY SGLANG_SWA_EVICTION_INTERVAL SGLANG_USE_IPC_POOL_HANDLE_CACHE
        SGLANG_USE_PICKLE_IPC SGL_FORCE_SHUTDOWN
    """,
    "memory, caches and details of graphs": """
        SGLANG_CACHE_DIR SGLANG_DSV4_COMPRESS_STATE_DTYPE SGLANG_EAGER_INPUT_NO_COPY
        SGLANG_ENABLE_GRAPH_POOL_BORROW SGLANG_ENABLE_GRAPH_POOL_PRECARVE
        SGLANG_FLASHINFER_AUTOTUNE_CACHE SGLANG_FLASHINFER_AUTOTUNE_EXTEND
        SGLANG_MAX_KV_CHUNK_CAPACITY SGLANG_MEMORY_SAVER_CUDA_GRAPH
        SGLANG_OPT_CUDA_GRAPH_FILL_FAST_PATH SGLANG_OPT_SKIP_GLUED_REPLAY_VIEW
        SGLANG_OPT_USE_ONLINE_COMPRESS
    """,
    "logs, checks, traces and profiles": """
        SGLANG_CACHE_HIT_RATE_WINDOW_SECONDS SGLANG_CHECK_KV_PAGE_INVARIANTS
        SGLANG_CUDA_COREDUMP_BEFORE_CRASH SGLANG_CUDA_COREDUMP_BEFORE_CRASH_WAIT_SECS
        SGLANG_DEBUG_HISPARSE_SKIP_IO SGLANG_DETECT_SLOW_RANK SGLANG_ENABLE_METRICS_DEVICE_TIMER
        SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE
        SGLANG_ENABLE_TREE_CACHE_SANITY_CHECK SGLANG_EXPOSE_OWN_ENV_VARS SGLANG_KERNEL_API_DUMP_DIR
        SGLANG_KERNEL_API_DUMP_EXCLUDE SGLANG_KERNEL_API_DUMP_INCLUDE SGLANG_KERNEL_API_LOGDEST
        SGLANG_KERNEL_API_LOGLEVEL SGLANG_KV_CANARY_ENABLE_TOKEN_ORACLE
        SGLANG_KV_CANARY_ENABLE_VERIFY_TOKEN_ASSERT SGLANG_LOG_DECODE_GRAPH_KEY
        SGLANG_LOG_FORWARD_ITERS SGLANG_LOG_GC SGLANG_LOG_PICKLE_IPC_OBJECTS
        SGLANG_MEM_PROFILE_MAX_ENTRIES SGLANG_PREFILL_DELAYER_DEBUG_LOG
        SGLANG_PROFILE_BY_STAGE_DECODE_MIN_BS SGLANG_PROFILE_RECORD_SHAPES SGLANG_PROFILE_V2
        SGLANG_PROFILE_WITH_STACK SGLANG_PYSPY_DUMP_BEFORE_CRASH SGLANG_RECORD_STEP_TIME
        SGLANG_ROUTING_KEY_POLICY_DEBUG_LOG SGLANG_TORCH_PROFILER_DIR
    """,
    "kernels and memory of experts": """
        SGLANG_DEEPGEMM_MASKED_MEMORY_BUDGET_FRACTION SGLANG_DEEPGEMM_ON_H20
        SGLANG_FLASHINFER_CUTEDSL_NVFP4_W4A16 SGLANG_HUMMING_MOE_GEMM_TYPE
        SGLANG_HUMMING_USE_F16_ACCUM SGLANG_IN_DEEPGEMM_PRECOMPILE_STAGE SGLANG_MOE_CONFIG_DIR
        SGLANG_MOE_COPY_WEIGHT_VIEWS_BEFORE_H2D SGLANG_MOE_PADDING SGLANG_TRTLLM_MOE_PDL_MAX_TOKENS
    """,
    "kernels and numerics beside the router": """
        SGLANG_ENABLE_DETERMINISTIC_INFERENCE SGLANG_ENABLE_MUSE_SPARK_AG_NORM_FUSION
        SGLANG_ENABLE_MUSE_SPARK_FINALIZE_AR SGLANG_ENABLE_PCG_DSV2_DUAL_STREAM
        SGLANG_NVFP4_CKPT_FP8_GEMM_IN_ATTN SGLANG_OPT_BEAM_DECODE_GEMV
        SGLANG_OPT_LINEARIZED_SHARED_SINK SGLANG_OPT_MOE_QUANT_ONCE
        SGLANG_OPT_SM120_NVFP4_PHASE_LAYOUT SGLANG_OPT_USE_INKLING_FUSED_AR_SHARED
        SGLANG_OPT_USE_MINIMAX_FP8_Q_EPILOGUE SGLANG_USE_DEEPGEMM_BMM
        SGLANG_USE_FUSED_PARALLEL_QKNORM
    """,
    "adapters: other kernels for the same products": """
        SGLANG_ENABLE_LOGPROB_CHUNK SGLANG_ENABLE_LORA_CSGMV_SPLIT_K
        SGLANG_ENABLE_LORA_SHRINK_SPLIT_K SGLANG_LOGPROB_CHUNK_SIZE SGLANG_LORA_CONFIG_DIR
        SGLANG_LORA_DENSE_CONFIG_DIR SGLANG_LORA_MOE_CONFIG_DIR SGLANG_OPT_FUSED_PERMUTE_QUANT
        SGLANG_OPT_LORA_CUBLAS SGLANG_OPT_LORA_CUBLAS_A SGLANG_OPT_LORA_CUBLAS_B
        SGLANG_OPT_LORA_CUBLAS_GATE_UP SGLANG_OPT_LORA_CUBLAS_KV_B SGLANG_OPT_LORA_CUBLAS_QKV
        SGLANG_OPT_LORA_OVERLAP_MAIN_ALLOC SGLANG_OPT_LORA_QKV_B_STORE
        SGLANG_OPT_LORA_SHARED_ADD_OVERLAP SGLANG_OPT_LORA_SHRINK_TUNE
        SGLANG_OPT_USE_INKLING_MULTI_STREAM_OVERLAP SGLANG_TWO_STREAM_MAX_TOKENS
    """,
    "tests of SGLang": """
        SGLANG_IS_IN_CI SGLANG_TEST_CRASH_AFTER_STREAM_OUTPUTS SGLANG_TEST_MAMBA_LAZY_ALLOC_FAIL
        SGLANG_TEST_RAGGED_VERIFY_FORCE_UNIFORM_CAPTURE SGLANG_TEST_SCRIPTED_RUNTIME
        SGLANG_TEST_STUCK_DETOKENIZER SGLANG_TEST_STUCK_DP_CONTROLLER
        SGLANG_TEST_STUCK_SCHEDULER_INIT SGLANG_TEST_STUCK_TOKENIZER
    """,
    "other kernels for the same function of the logits, before the re-routing": """
        SGLANG_K3_RADIX4_TOPK SGLANG_OPT_GATE_GEMV_MODE SGLANG_OPT_KIMI_GATE_BF16_INPUT
        SGLANG_OPT_USE_BF16_ROUTER_GEMM SGLANG_OPT_USE_GATE_TOPK_JIT
        SGLANG_OPT_USE_JIT_KERNEL_GROUPED_TOPK SGLANG_OPT_USE_JIT_KERNEL_KIMI_GATE
        SGLANG_USE_CUSTOM_ROUTER_SUM
    """,
}
"""Variables that SGLang's MoE, router, graph and scheduler code reads."""
