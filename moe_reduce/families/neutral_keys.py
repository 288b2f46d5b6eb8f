"""Keys of a config.json that change nothing that is computed here, in any family of transformers."""

NOTES = {
    "architectures", "auto_map", "base_model_name_or_path", "custom_pipelines", "dtype", "finetuning_task",
    "is_llama_config", "max_sequence_length", "model_max_length", "model_type", "name_or_path", "tokenizer_class",
    "torch_dtype", "transformers.js_config", "transformers_version", "unsloth_fixed", "unsloth_version",
}  # fmt: skip
# Token ids, which the tokenizer and generation_config.json state.
TOKENS = {
    "bos_token_id", "cls_token_id", "decoder_start_token_id", "eos_token_id", "mask_token_id", "pad_token_id",
    "sep_token_id", "unk_token_id",
}  # fmt: skip
# Settings of the training that made the model.
TRAINING = {
    "attention_dropout", "classifier_dropout", "gradient_checkpointing", "hidden_dropout", "output_router_logits",
    "router_aux_loss_coef",
}  # fmt: skip
# What a call returns and by which kernels, and heads for classification.
CALLS = {
    "attn_implementation", "chunk_size_feed_forward", "experts_implementation", "id2label", "is_decoder", "label2id",
    "num_labels", "output_attentions", "output_hidden_states", "pretraining_tp", "problem_type", "return_dict",
    "task_specific_params", "torchscript", "use_bfloat16", "use_cache",
}  # fmt: skip
# Settings of generation, which transformers 5 ignores here and reads from generation_config.json.
GENERATION = {
    "assistant_confidence_threshold", "assistant_lookbehind", "bad_words_ids", "begin_suppress_tokens",
    "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty",
    "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "max_new_tokens", "min_length", "no_repeat_ngram_size", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores",
    "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "suppress_tokens", "target_lookbehind",
    "temperature", "top_k", "top_p", "typical_p",
}  # fmt: skip
NEUTRAL = frozenset(NOTES | TOKENS | TRAINING | CALLS | GENERATION)
