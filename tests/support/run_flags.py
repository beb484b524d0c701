"""Flags of a run that say how it computed, with values that Megatron takes on many GPUs only, or never together."""

from __future__ import annotations

PIPELINE = {
    "pipeline_model_parallel_size": 2,
    "decoder_first_pipeline_num_layers": 1,
    "decoder_last_pipeline_num_layers": 1,
    "account_for_embedding_in_pipeline_split": True,
    "account_for_loss_in_pipeline_split": True,
    "virtual_pipeline_model_parallel_size": 2,
    "num_layers_per_virtual_pipeline_stage": 1,
    "pipeline_model_parallel_layout": "Et|tL",
    "microbatch_group_size_per_vp_stage": 3,
}
LAYOUT = {
    "tensor_model_parallel_size": 16,
    "sequence_parallel": True,
    "context_parallel_size": 3,
    "hierarchical_context_parallel_sizes": [3, 1],
    "cp_comm_type": ["a2a+p2p", "a2a"],
    "hybrid_context_parallel": True,
    "expert_model_parallel_size": 5,
    "expert_tensor_parallel_size": 7,
}
OVERLAP = {
    "tp_comm_overlap": True,
    "overlap_moe_expert_parallel_comm": True,
    "delay_wgrad_compute": True,
    "defer_embedding_wgrad_compute": True,
    "wgrad_deferral_limit": 3,
    "moe_shared_expert_overlap": True,
    "moe_token_dispatcher_type": "flex",
    "moe_enable_deepep": True,
    "moe_flex_dispatcher_backend": "hybridep",
    "moe_router_padding_for_quantization": True,
    "moe_router_padding_for_fp8": True,
    "moe_pad_expert_input_to_capacity": True,
}
MEMORY = {
    "recompute_granularity": "full",
    "recompute_method": "block",
    "recompute_num_layers": 99,
    "distribute_saved_activations": True,
    "recompute_modules": ["moe"],
    "moe_layer_recompute": True,
    "cpu_offloading_num_layers": 1,
    "fine_grained_activation_offloading": True,
    "offload_modules": ["attn"],
    "enable_cuda_graph": True,
    "external_cuda_graph": True,
    "cuda_graph_impl": "transformer_engine",
}
KERNELS = {
    "transformer_impl": "transformer_engine",
    "fp8": "hybrid",
    "fp4": "e2m1",
    "first_last_layers_bf16": True,
    "moe_permute_fusion": True,
    "moe_router_fusion": True,
    "use_te_activation_func": True,
    "use_transformer_engine_op_fuser": True,
    "use_kitchen_attention": True,
    "flash_decode": True,
    "batch_invariant_mode": True,
    "masked_softmax_fusion": True,
    "bias_dropout_fusion": True,
}
TRAINING = {
    "init_model_with_meta_device": True,
    "moe_use_upcycling": True,
    "hidden_dropout": 0.5,
    "attention_dropout": 0.5,
    "moe_z_loss_coeff": 1.0,
    "qk_clip": True,
    "calculate_per_token_loss": True,
    "moe_per_layer_logging": True,
    "moe_enable_routing_replay": True,
    "config_logger_dir": "nowhere",
}
GROUPS = {
    "pipeline": PIPELINE,
    "layout": LAYOUT,
    "overlap": OVERLAP,
    "memory": MEMORY,
    "kernels": KERNELS,
    "training": TRAINING,
}
HOW_IT_RAN = {name: value for group in GROUPS.values() for name, value in group.items()}
