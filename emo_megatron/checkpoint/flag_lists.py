"""Lists of the flags of Megatron that describe models, by whether they change the model; imports nothing.

Every flag of the groups in model_flags.py is in one of FUNCTION, AS_TRAINED and NOT_THE_MODEL.
"""

from __future__ import annotations


def names(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


FUNCTION = names(
    """
    num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups group_query_attention kv_channels
    max_position_embeddings padded_vocab_size untie_embeddings_and_output_weights
    position_embedding_type add_position_embedding use_rotary_position_embeddings rotary_base rotary_percent
    rotary_interleaved rotary_seq_len_interpolation_factor rotary_scaling_factor use_rope_scaling rope_scaling_factor
    rope_type no_rope_freq mrope_section relative_attention_num_buckets relative_attention_max_distance
    yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow yarn_correction_range_round_to_int
    mscale mscale_all_dim
    normalization layernorm_epsilon layernorm_zero_centered_gamma apply_residual_connection_post_layernorm
    swiglu squared_relu openai_gelu quick_geglu glu_linear_offset activation_func_clamp_value
    add_bias_linear add_qkv_bias qk_layernorm qk_l2_norm attention_output_gate softmax_type
    window_size window_attn_skip_freq
    multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim
    experimental_attention_variant linear_attention_freq linear_conv_kernel_dim linear_key_head_dim
    linear_value_head_dim linear_num_key_heads linear_num_value_heads
    dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_topk_freq dsa_indexer_skip_topk_offset
    dsa_indexer_rope_interleaved dsa_indexer_rotate_activation dsa_indexer_scoring_relu dsa_indexer_k_norm_epsilon
    num_experts moe_layer_freq moe_ffn_hidden_size moe_latent_size moe_apply_probs_on_input
    moe_shared_expert_intermediate_size moe_shared_expert_gate
    moe_mlp_glu_interleave_size moe_shared_expert_glu_interleave_size
    moe_router_topk moe_router_pre_softmax moe_router_score_function moe_router_topk_scaling_factor
    moe_router_num_groups moe_router_group_topk moe_router_topk_limited_devices moe_router_enable_expert_bias
    moe_router_load_balancing_type moe_router_force_load_balancing moe_router_force_biased moe_input_jitter_eps
    moe_expert_capacity_factor moe_token_dropping moe_token_drop_policy
    mtp_num_layers mtp_use_repeated_layer mtp_hybrid_override_pattern
    use_mup mup_width_mult mup_base_hidden_size mup_embedding_mult mup_output_mult mup_base_head_dim
    mup_attn_scale_power
    heterogeneous_layers_config_path heterogeneous_layers_config_encoded_json
    hybrid_layer_pattern hybrid_override_pattern is_hybrid_model
    mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads
    """
)
"""Flags that change the function of a model."""

TOKENIZER = names(
    """
    vocab_file merge_file vocab_extra_ids
    tokenizer_type tokenizer_model metadata_path special_tokens tiktoken_pattern tiktoken_num_special_tokens
    tokenizer_sentencepiece_legacy tokenizer_sentencepiece_ignore_extra_whitespaces tokenizer_hf_no_use_fast
    tokenizer_hf_no_include_special_tokens trust_remote_code null_tokenizer_eod_id null_tokenizer_pad_id chat_template
    """
)
"""Flags of the tokenizer, a part of AS_TRAINED."""

AS_TRAINED = TOKENIZER | names(
    """
    bf16 fp16 attention_softmax_in_fp32 apply_query_key_layer_scaling fp32_residual_connection moe_router_dtype
    dsa_indexer_k_norm_fp32 moe_grouped_gemm moe_single_grouped_weight moe_single_grouped_bias mla_down_proj_fusion
    enable_experimental seq_length bias_gelu_fusion
    vocab_size make_vocab_size_divisible_by pad_vocab_size
    """
)
"""Flags that change rounding, the form of the weights or the tokens of a text: commands use the values of the run."""

NOT_THE_MODEL = names(
    """
    tensor_model_parallel_size tensor_parallel_num_weight_shards pipeline_model_parallel_comm_backend
    pipeline_model_parallel_size sequence_parallel context_parallel_size hierarchical_context_parallel_sizes
    max_seqlen_per_dp_cp_rank hybrid_context_parallel expert_model_parallel_size expert_tensor_parallel_size
    expert_tensor_parallel_num_weight_shards microbatch_group_size_per_vp_stage mtp_standalone
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split encoder_num_layers decoder_num_layers

    tp_comm_overlap tp_comm_overlap_cfg tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs
    tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_split_rs tp_comm_bootstrap_backend
    overlap_moe_expert_parallel_comm delay_wgrad_compute overlap_dispatch_backward_with_experts_wgrad
    ep_overlap_early_attn_memory_release use_ring_exchange_p2p defer_embedding_wgrad_compute wgrad_deferral_limit
    overlap_p2p_comm_warmup_flush symmetric_ar_type nccl_all_reduce_for_prefill high_priority_a2a_comm_stream

    recompute_granularity recompute_method recompute_num_layers recompute_modules recompute_activations
    distribute_saved_activations checkpoint_activations moe_layer_recompute
    cpu_offloading_num_layers cpu_offloading_retain_pinned_cpu_buffers fine_grained_activation_offloading
    offload_modules min_offloaded_tensor_size delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks
    activation_offload_fraction fine_grained_offloading_max_inflight_offloads moe_paged_stash
    moe_paged_stash_page_size moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_buffer_size_factor_cpu
    enable_cuda_graph cuda_graph_warmup_steps external_cuda_graph cuda_graph_impl inference_cuda_graph_scope

    perform_initialization use_cpu_initialization init_method_std embedding_init_method_std
    init_model_with_meta_device moe_use_upcycling moe_upcycling_granularity

    cross_entropy_loss_fusion cross_entropy_fusion_impl disable_bf16_reduced_precision_matmul
    use_fused_weighted_squared_relu fused_residual_rmsnorm use_transformer_engine_op_fuser use_te_activation_func
    masked_softmax_fusion bias_swiglu_fusion bias_dropout_fusion apply_rope_fusion
    gradient_accumulation_fusion no_persist_layer_norm moe_permute_fusion moe_router_fusion
    use_grouped_gemm_for_shared_expert use_grouped_gemm_for_dense_mlp attention_backend flash_attention_version
    use_flash_attn transformer_impl dsa_kernel_backend use_kitchen_attention kitchen_attention_backend
    deterministic_mode batch_invariant_mode clone_scatter_output_in_embedding onnx_safe

    fp8 fp8_recipe fp8_quantizer_factory fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo
    fp8_wgrad fp8_output_proj fp8_param_gather first_last_layers_bf16 num_layers_at_start_in_bf16
    num_layers_at_end_in_bf16 fp4 fp4_recipe fp4_quantizer_factory fp4_param_gather te_precision_config_file
    grad_reduce_in_bf16 loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis
    accumulate_allreduce_grads_in_fp32 fp16_lm_cross_entropy reuse_grad_buf_for_mxfp8_param_ag
    mamba_training_ssm_states_dtype

    moe_token_dispatcher_type moe_enable_deepep moe_flex_dispatcher_backend moe_permute_fusion_into_hybridep
    moe_expert_rank_capacity_factor
    moe_hybridep_pad_uneven_dispatch_inputs moe_flex_dispatcher_num_sms moe_deepep_num_sms moe_hybridep_num_sms
    moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms_preprocessing
    moe_ncclep_static_shape moe_ncclep_zero_copy moe_shared_expert_overlap moe_router_padding_for_quantization
    moe_router_padding_for_fp8 moe_pad_expert_input_to_capacity moe_pad_experts_for_cuda_graph_inference

    hidden_dropout attention_dropout calculate_per_token_loss mtp_loss_scaling_factor mtp_detach_heads
    moe_aux_loss_coeff moe_z_loss_coeff moe_router_bias_update_rate moe_router_quantile_balancing_ema
    dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss qk_clip qk_clip_alpha qk_clip_threshold
    moe_enable_routing_replay moe_per_layer_logging config_logger_dir

    flash_decode cache_mla_latents mlp_chunks_for_prefill mlp_chunks_for_training use_mamba_mem_eff_path
    inference_fuse_tp_communication inference_disable_triton_nvls_kernels inference_grouped_gemm_backend
    inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type

    micro_batch_size global_batch_size rampup_batch_size step_batch_size_schedule decrease_batch_size_if_needed
    empty_unused_memory_level check_weight_hash_across_dp_replicas_interval gpu_sniff_test_interval
    train_sync_interval train_iters train_samples exit_interval exit_duration_in_mins exit_signal_handler exit_signal
    exit_signal_handler_for_dataloader exit_signal_handler_for_training manual_gc manual_gc_interval manual_gc_eval
    iterations_to_skip batch_size check_for_nan_in_loss_and_grad check_for_large_grads
    result_rejected_tracker_filename optimizer optimizer_cpu_offload optimizer_cuda_graph optimizer_offload_fraction
    use_torch_optimizer_for_cpu_offload overlap_cpu_optimizer_d2h_h2d dump_param_to_param_group_map pin_cpu_grads
    pin_cpu_params dataloader_type deprecated_use_mcore_models bert_binary_head spec yaml_cfg
    use_precision_aware_optimizer main_grads_dtype main_params_dtype exp_avg_dtype exp_avg_sq_dtype
    megatron_fsdp_main_params_dtype megatron_fsdp_main_grads_dtype megatron_fsdp_grad_comm_dtype
    megatron_fsdp_enable_fine_grained_param_gather megatron_fsdp_max_pool_double_buffer
    fsdp_db_use_persist_buf_on_alloc_fail
    """
)
"""Flags of the run: layout, kernels, duration. Commands use Megatron's defaults."""
