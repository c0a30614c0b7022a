"""Flags of Megatron-LM and Megatron-DeepSpeed that this project does not have, and what to do instead."""

_EXPERTS = "there are no mixture-of-experts layers; leave it out to train the dense model"
_FP8 = "there is no 8-bit or 4-bit training; use --bf16"
_WANDB = "set the environment variable that the wandb package reads instead: "
_SPLIT = "give the layers of each stage: --pipeline-split 5,7,7,5"
_ROPE_SCALING = "rotary frequencies follow from --rotary-base alone; leave it out"
_DECAY = "weight decay is constant over the run: give --weight-decay alone"
_DEEPSPEED = ("there is no DeepSpeed engine; leave it out. ZeRO is --data-parallel-sharding-strategy, and the block "
              "random_ltd is --random-ltd --random-ltd-start-length MIN_VALUE --random-ltd-steps REQUIRE_STEPS "
              "--random-ltd-length-step SEQ_PER_STEP --random-ltd-layers LIST")
_ZERO = "use --data-parallel-sharding-strategy optim_grads (stages 1 and 2) or optim_grads_params (stage 3)"
_BERT = "BERT pretraining is not available yet in this version"
_CURRICULUM = "a sequence-length curriculum is not available; --random-ltd saves compute on short sequences its own way"

UNSUPPORTED: dict[str, str] = {
    # model
    "--transformer-impl": "there is one implementation, in PyTorch; leave it out, and see --compile",
    "--use-legacy-models": "there is one implementation; leave it out",
    "--spec": "the layers are set by flags such as --normalization and --swiglu; leave it out",
    "--use-flash-attn": "leave it out: torch's attention runs the flash kernel by itself where it applies",
    "--use-flash-attn-v1": "leave it out: torch's attention runs the flash kernel by itself where it applies",
    "--use-flash-attn-v2": "leave it out: torch's attention runs the flash kernel by itself where it applies",
    "--use-flash-attn-triton": "leave it out: torch's attention runs the flash kernel by itself where it applies",
    "--use-rotary-position-embeddings": "use --position-embedding-type rope",
    "--no-position-embedding": "use --position-embedding-type none, or rope",
    "--rotary-position-embeddings-theta": "use --rotary-base",
    "--rotary-interleaved": "rotary embeddings pair channel i with channel i + half; leave it out",
    "--rotary-seq-len-interpolation-factor": _ROPE_SCALING,
    "--rotary-scaling-factor": _ROPE_SCALING,
    "--use-rope-scaling": _ROPE_SCALING,
    "--rope-scaling-factor": _ROPE_SCALING,
    "--no-rope-freq": "every layer rotates; leave it out",
    "--squared-relu": "the MLP has GELU; use --swiglu or leave it out",
    "--quick-geglu": "use --swiglu",
    "--apply-layernorm-1p": "norm weights are stored as they are, not as weight - 1; leave it out",
    "--layernorm-epsilon": "use --norm-epsilon",
    "--apply-residual-connection-post-layernorm": "normalisation is before each part of a layer; leave it out",
    "--apply-query-key-layer-scaling": "scores are not scaled by the layer's number; leave it out",
    "--fp32-residual-connection": "leave it out",
    "--qk-layernorm": "queries and keys are not normalised; leave it out",
    "--qk-l2-norm": "queries and keys are not normalised; leave it out",
    "--window-size": "attention sees the whole sequence; shorten --seq-length instead",
    "--num-key-value-heads": "use --group-query-attention --num-query-groups N",
    "--init-method-xavier-uniform": "weights are normal with --init-method-std",
    "--init-method": "weights are normal with --init-method-std",
    "--vocab-extra-ids": "give a larger --vocab-size",
    "--multi-latent-attention": "use --group-query-attention to shrink keys and values",
    # batch, schedule, optimizer
    "--batch-size": "use --micro-batch-size",
    "--step-batch-size-schedule": "use --rampup-batch-size START INCREMENT SAMPLES",
    "--decrease-batch-size-if-needed": "choose a --global-batch-size that --micro-batch-size x processes divides",
    "--warmup": "use --lr-warmup-fraction",
    "--use-checkpoint-opt_param-scheduler": "give the learning-rate flags of the checkpointed run again",
    "--start-weight-decay": _DECAY,
    "--end-weight-decay": _DECAY,
    "--weight-decay-incr-style": _DECAY,
    "--sgd-momentum": "the momentum of --optimizer sgd is 0.9",
    "--decoupled-lr": "one --lr holds for all weights",
    "--decoupled-min-lr": "one --min-lr holds for all weights",
    "--head-lr-mult": "one --lr holds for all weights",
    "--dataloader-type": "samples are read in one shuffled pass after another, as with `single`; leave it out",
    "--iterations-to-skip": "leave it out",
    "--skip-train": "use tools/evaluate_zeroshot.py to score a checkpoint",
    "--cpu-optimizer": "the optimizer runs where the weights are; shard its state with --use-distributed-optimizer",
    "--optimizer-cpu-offload": "the optimizer runs where the weights are; shard its state with "
                               "--use-distributed-optimizer",
    # precision
    "--fp16-lm-cross-entropy": "the loss is computed in fp32; leave it out",
    "--grad-reduce-in-bf16": "gradients are reduced in fp32; leave it out",
    "--main-params-dtype": "weights are kept in fp32; leave it out",
    "--main-grads-dtype": "gradients are kept in fp32; leave it out",
    "--use-precision-aware-optimizer": "optimizer state is fp32; leave it out",
    # parallelism
    "--model-parallel-size": "use --tensor-model-parallel-size",
    "--context-parallel-size": "the sequence is split by --sequence-parallel with --tensor-model-parallel-size only",
    "--cp-comm-type": "there is no context parallelism; see --sequence-parallel",
    "--expert-model-parallel-size": _EXPERTS,
    "--expert-tensor-parallel-size": _EXPERTS,
    "--num-experts": _EXPERTS,
    "--num-virtual-stages-per-pipeline-rank": "use --pipeline-schedule interleaved "
                                              "--num-layers-per-virtual-pipeline-stage N",
    "--microbatch-group-size-per-virtual-pipeline-stage": "the schedule chooses its own groups; leave it out",
    "--decoder-first-pipeline-num-layers": _SPLIT,
    "--decoder-last-pipeline-num-layers": _SPLIT,
    "--pipeline-model-parallel-layout": _SPLIT,
    "--account-for-embedding-in-pipeline-split": _SPLIT,
    "--account-for-loss-in-pipeline-split": _SPLIT,
    "--standalone-embedding-stage": _SPLIT,
    "--pipeline-model-parallel-split-rank": "there are no encoder-decoder models; leave it out",
    "--enable-zbh1-pipeline": "use --pipeline-schedule interleaved-zero-bubble, or zbv",
    "--use-tp-pp-dp-mapping": "the order of ranks is fixed: tensor, then data, then pipeline; leave it out",
    "--use-torch-fsdp2": "use --data-parallel-sharding-strategy optim_grads_params",
    "--use-custom-fsdp": "use --data-parallel-sharding-strategy optim_grads_params",
    "--use-megatron-fsdp": "use --data-parallel-sharding-strategy optim_grads_params",
    "--num-distributed-optimizer-instances": "state is sharded over all data-parallel processes; leave it out",
    "--data-parallel-random-init": "all data-parallel processes start from the same weights; leave it out",
    "--recompute-method": "--recompute-granularity full recomputes every layer, as `uniform` with one layer does",
    "--recompute-num-layers": "--recompute-granularity full recomputes every layer on its own",
    "--recompute-modules": "--recompute-granularity selective recomputes the attention core",
    "--distribute-saved-activations": "use --sequence-parallel",
    "--checkpoint-activations": "use --recompute-granularity full",
    "--checkpoint-num-layers": "use --recompute-granularity full",
    "--no-pipeline-parallel": "leave it out: --pipeline-model-parallel-size 1 is the default",
    # data
    "--yaml-cfg": "use --config FILE.toml",
    "--data-impl": "corpora are Megatron's .bin/.idx; leave it out",
    "--data-args-path": "give the list in --data-path, or as data_path in --config",
    "--per-split-data-args-path": "use --train-data-path, --valid-data-path and --test-data-path",
    "--train-data-exact-num-epochs": "use --train-samples",
    "--tiktoken-pattern": "use --tokenizer-type HuggingFaceTokenizer with a tokenizer.json",
    "--curriculum-learning": _CURRICULUM,
    "--data-efficiency-curriculum-learning": _CURRICULUM,
    # checkpoints
    "--ckpt-format": "there is one format, torch's distributed checkpoint on safetensors; leave it out",
    "--dist-ckpt-strictness": "names and shapes must always match; leave it out",
    "--pretrained-checkpoint": "use --load DIR --finetune",
    "--use-mp-args-from-checkpoint-args": "a checkpoint has no layout; give the parallel flags of this run",
    "--reset-iteration": "use --finetune, which loads the weights and starts at step 0",
    "--load-tag": "use --ckpt-step",
    # logging
    "--wandb-exp-name": _WANDB + "WANDB_NAME",
    "--wandb-entity": _WANDB + "WANDB_ENTITY",
    "--wandb-save-dir": _WANDB + "WANDB_DIR",
    # DeepSpeed
    "--deepspeed": _DEEPSPEED,
    "--deepspeed_config": _DEEPSPEED,
    "--deepspeed-config": _DEEPSPEED,
    "--deepspeed-activation-checkpointing": "use --recompute-granularity full",
    "--zero-stage": _ZERO,
    "--ds-sequence-parallel-size": "use --sequence-parallel with --tensor-model-parallel-size",
    # later
    "--bert-no-binary-head": _BERT,
    "--mask-prob": _BERT,
    "--short-seq-prob": _BERT,
    "--layer-token-lr": "a learning rate by layer tokens is not available yet in this version; use --lr-decay-tokens "
                        "and --lr-warmup-tokens, which count raw tokens",
}
"""Flag -> what to do instead."""

FAMILIES: dict[str, str] = {
    "--moe-": _EXPERTS,
    "--fp8-": _FP8,
    "--fp4-": _FP8,
    "--tp-comm-": "communication of tensor parallelism is not configurable; leave it out",
    "--disable-tp-comm-": "communication of tensor parallelism is not configurable; leave it out",
    "--cuda-graph-": "see --compile",
    "--inference-": "there is no serving; use tools/evaluate_zeroshot.py to score a checkpoint",
    "--non-persistent-": "use --save-interval with --async-save and --save-retain-interval",
    "--logits-": "there is no distillation",
    "--kd-": "there is no distillation",
    "--kitchen-": _FP8,
    "--otel-": "use --metrics-file, --tensorboard-dir or --wandb-project",
    "--one-logger-": "use --metrics-file, --tensorboard-dir or --wandb-project",
    "--encoder-": "there are no encoder-decoder models; leave it out",
    "--inprocess-": "a failed run is started again by its launcher, and continues with --load",
    "--ft-": "a failed run is started again by its launcher, and continues with --load",
    "--retro-": "there are no retrieval models",
    "--mamba-": "there are no state-space layers",
    "--hybrid-": "there are no state-space layers",
    "--muon-": "use --optimizer adam",
    "--yarn-": _ROPE_SCALING,
    "--mtp-": "there is no multi-token prediction; leave it out",
    "--rl-": "there is no reinforcement learning",
    "--grpo-": "there is no reinforcement learning",
    "--fim-": "there is no fill-in-the-middle",
    "--dino-": "vision models are not available yet in this version",
    "--vision-": "vision models are not available yet in this version",
    "--megatron-fsdp-": "use --data-parallel-sharding-strategy optim_grads_params",
    "--torch-fsdp2-": "use --data-parallel-sharding-strategy optim_grads_params",
    "--biencoder-": "there are no retrieval models",
    "--retriever-": "there are no retrieval models",
    "--zero-": _ZERO,
    "--ds-": _DEEPSPEED,
}
"""Beginning of a flag -> what to do instead."""

SATISFIED: dict[str, tuple[str, ...]] = {
    "--transformer-impl": ("local",),
    "--rotary-seq-len-interpolation-factor": ("1",),
    "--weight-decay-incr-style": ("constant",),
    "--sgd-momentum": ("0.9",),
    "--dataloader-type": ("single",),
    "--main-params-dtype": ("fp32",),
    "--main-grads-dtype": ("fp32",),
    "--context-parallel-size": ("1",),
    "--expert-model-parallel-size": ("1",),
    "--expert-tensor-parallel-size": ("1",),
    "--num-distributed-optimizer-instances": ("1",),
    "--recompute-method": ("uniform",),
    "--recompute-num-layers": ("1",),
    "--recompute-modules": ("core_attn",),
    "--data-impl": ("mmap", "infer"),
    "--ckpt-format": ("torch_dist",),
    "--dist-ckpt-strictness": ("raise_all",),
    "--zero-stage": ("0",),
}
"""Values of unsupported flags that ask for what happens here anyway."""

VALUES: dict[tuple[str, str], str] = {
    ("--token-drop-policy", "importance"): "the policy `importance` is not available yet in this version; use random",
    ("--tokenizer-type", "Llama2Tokenizer"): "use SentencePieceTokenizer with --tokenizer-model FILE.model",
    ("--tokenizer-type", "GPTSentencePieceTokenizer"): "use SentencePieceTokenizer with --tokenizer-model FILE.model",
    ("--tokenizer-type", "PretrainedFromHF"): "use HuggingFaceTokenizer with --tokenizer-model FOLDER",
    ("--tokenizer-type", "HFTokenizer"): "use HuggingFaceTokenizer with --tokenizer-model FOLDER",
    ("--tokenizer-type", "BertWordPieceLowerCase"): _BERT,
    ("--tokenizer-type", "BertWordPieceCase"): _BERT,
    ("--data-parallel-sharding-strategy", "optim"): "use optim_grads, which shards gradients too",
    ("--distributed-backend", "ccl"): "use auto, nccl or gloo",
}
"""(Flag of this project, value that it has elsewhere) -> what to do instead."""
