"""Names of further flags of Megatron-LM and Megatron-DeepSpeed, so that one is not taken for a slip of the pen."""

OTHER_FLAGS: frozenset[str] = frozenset("--" + name for name in """
    adlr-autoresume adlr-autoresume-interval allow-ambiguous-pad-tokens aml-data-download-path
    app-tag-run-name app-tag-run-version apply-wd-to-qk-layernorm bert-embedder-type bert-load
    block-data-path cache-mla-latents calc-ft-timeouts check-for-large-grads check-for-spiky-loss
    check-weight-hash-across-dp-replicas-interval checkpoint-in-cpu ckpt-convert-format ckpt-convert-save
    ckpt-convert-update-legacy-dist-opt-format ckpt-drop-redundant-extra-state classes-fraction
    config-logger-dir contigious-checkpointing cpu_torch_adam create-all-gather-group
    create-moe-param-group data-per-class-fraction dataloader-defer-npy-index-mmap
    dataloader-fast-cache-load dataloader-inter-document-masking
    ddp-param-name-patterns-for-fp32-local-accumulation ddp-reduce-scatter-with-fp32-accumulation
    decode-only-cuda-graphs decoder-num-layers decoder-seq-length defer-embedding-wgrad-compute
    disable-bf16-reduced-precision-matmul disable-mamba-mem-eff-path disable-moe-token-dropping
    disable-moe-top2-2nd-expert-sampling disable-msc disable-straggler-on-startup
    disable-symmetric-registration dist-ckpt-workers distribute-checkpointed-activations ds_fused_adam
    dump-param-to-param-group-map embedding-path embedding-weights-in-fp32 enable-chunked-prefill
    enable-cuda-graph enable-experimental enable-expert-tensor-parallelism enable-ft-package
    enable-full-sharding-in-hsdp enable-msc enable-zbh1-exact-semantics error-injection-rate
    error-injection-type evidence-data-path exp-avg-dtype exp-avg-sq-dtype expert-interval
    external-cuda-graph fake-process-group first-last-layers-bf16 flash-decode force-ds-sequence-parallel
    freeze-all-layers fsdp-db-use-persist-buf-on-alloc-fail fsdp-double-buffer fsdp-manual-registration
    gtp-expert-remat-nccl-ub gtp-remat-nccl-ub gtp-remat-reduce-scatter-with-fp32-accumulation
    heterogeneous-layers-config-encoded-json heterogeneous-layers-config-path hidden-size-teacher
    hierarchical-context-parallel-sizes high-priority-stream-groups ict-head-size ict-load
    indexer-batch-size indexer-log-interval inference is-hybrid-model iter-per-epoch kd
    keep-fp8-transpose-cache keep-fp8-transpose-cache-when-using-custom-fsdp kill-switch-file kv-lora-rank
    langrl-env-config linear-attention-freq lion-beta1 lion-beta2 load-model-opt-format load-teacher
    log-straggler logging-level mask-factor mask-type max-tokens-to-oom memory-centric-tiled-linear
    memory-snapshot-path mid-level-dataset-surplus mla-down-proj-fusion mlp-chunks-for-prefill mlp-type
    mos mrope-section mscale mscale-all-dim nccl-all-reduce-for-prefill nccl-communicator-config-path
    no-fp8-wgrad no-pin-cpu-grads no-pin-cpu-params no-use-layer-wise-param-layout
    no-use-tokenizer-model-from-checkpoint-args no-weight-decay-cond-type
    no-yarn-correction-range-round-to-int num-attention-heads-teacher
    num-experts-switch num-experts-teacher num-layers-at-end-in-bf16 num-layers-at-start-in-bf16
    num-layers-teacher num-speculative-tokens object-storage-cache-path optimizer-cuda-graph
    optimizer-offload-fraction outer-dp-sharding-strategy output-bert-embeddings output-logit-dtype
    overlap-cpu-optimizer-d2h-h2d override-ckpt-iteration partition-activations
    per-dataset-sequences-path perform-rl-step persistent-save-interval phase-transition-iterations
    pipeline-model-parallel-comm-backend profile-backward profile_steps q-lora-rank qk-head-dim
    qk-pos-emb-head-dim query-in-block-prob record-memory-history refit-method
    relative-attention-max-distance relative-attention-num-buckets remote-device repeated-dataloader
    replication replication-factor replication-jump rerun-mode result-rejected-tracker-filename
    return-data-index reuse-grad-buf-for-mxfp8-param-ag rope-type run-workload-inspector-server
    sample-rate scattered-embeddings sft sft-tokenizer-prompt-format split-transformers
    straggler-ctrlr-port straggler-minmax-count suggested-communication-unit-size swin-backbone-type
    symmetric-ar-type synchronize-each-layer te-precision-config-file te-rng-tracker test-mode
    tiktoken-num-special-tokens tiktoken-special-tokens tile-factor titles-data-path topk train-desc-path
    train-doc-idx-path train-idx-path train-sample-idx-path train-shuffle-idx-path train-sync-interval
    trust-remote-code use-dataset-only use-flash-attn-builder use-legacy-static-engine use-nccl-ub
    use-one-sent-docs use-same-sampling-seed-across-dp-ranks use-sharp use-torch-optimizer-for-cpu-offload
    use-tutel v-head-dim wgrad-deferral-limit window-attn-skip-freq
""".split())
