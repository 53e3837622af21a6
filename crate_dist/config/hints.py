"""What other programs call the settings and options of this one: for hints alone, none of it is accepted.

Words of more than a letter are in lower case, with `_` between their parts, and without the section.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def _by_word(lines: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for ours, words in lines.items():
        for word in words.split():
            found[word] = found.get(word, ()) + tuple(ours.split())
    return found


KEYS = _by_word(
    {
        "model.arch": "model_size model_name",
        "model.width": "dim hidden_size hidden_dim embed_dim n_embd",
        "model.depth": "layers num_layers n_layers n_layer",
        "model.heads": "num_heads n_heads n_head",
        "model.ratio": "mlp_ratio expansion overcomplete_ratio",
        "model.mixer": "attention attn attn_layer",
        "model.in_bias": "qkv_bias",
        "model.drop_path": "drop_path_rate stochastic_depth",
        "model.layer_scale": "layerscale init_values eta",
        "model.image_size": "img_size input_size resolution crop_size size",
        "model.patch_size": "patch",
        "model.num_classes": "classes n_classes nb_classes n_class",
        "model.dropout": "drop drop_rate dropout_rate p_drop",
        "data.root": "data_path data_dir dataset data_root imagenet_path train_data dir path",
        "data.workers": "num_workers n_workers nworkers loader_workers dataloader_num_workers",
        "augment.flip": "hflip horizontal_flip random_flip",
        "augment.erase": "reprob random_erasing random_erase cutout",
        "augment.erase_mode": "remode",
        "augment.randaugment augment.randaugment_ops augment.randaugment_magnitude": "aa auto_augment autoaugment "
        "rand_augment randaug",
        "augment.randaugment_std": "mstd magnitude_std",
        "augment.color_jitter": "jitter colour_jitter colorjitter",
        "order.repeats": "repeated_aug aug_repeats num_repeats repeated_augmentation re_sample",
        "augment.crop_scale": "scale rrc_scale",
        "mix.mixup": "mixup_alpha mixup_a",
        "mix.cutmix": "cutmix_alpha cutmix_a",
        "mix.switch": "mixup_switch_prob switch_prob cutmix_prob",
        "mix.probability": "mixup_prob mix_prob",
        "images.resize_filter": "interpolation",
        "images.eval_crop": "crop_pct crop_ratio_eval",
        "optim.name": "opt optimizer optimiser",
        "optim.lr": "learning_rate base_lr peak_lr max_lr initial_lr lr0 blr base_learning_rate lrate",
        "optim.weight_decay": "wd l2 weightdecay",
        "optim.betas": "beta beta1 beta2 momentum opt_betas",
        "optim.ema_decay": "ema model_ema model_ema_decay ema_rate polyak weight_averaging average_decay swa",
        "optim.eps": "epsilon opt_eps",
        "optim.schedule": "sched scheduler lr_scheduler lr_schedule lr_decay_style scheduler_type",
        "optim.decay": "no_decay wd_mults no_weight_decay filter_bias_and_bn bias_decay norm_decay",
        "optim.layer_decay": "llrd lwd layer_wise_decay layerwise_lr_decay lr_mult lr_mults layer_lr_decay",
        "optim.min_lr": "lr_min eta_min final_lr end_lr",
        "optim.warmup_lr": "warmup_lr_init warmup_start_lr warmup_init_lr",
        "optim.cooldown_epochs": "cooldown cooldown_steps",
        "optim.warmup_epochs": "warmup warmup_steps warmup_ratio warmup_iters num_warmup_steps lr_warmup_epochs",
        "optim.grad_clip": "clip clip_grad clip_norm grad_norm max_grad_norm gradient_clipping gradient_clip_val",
        "optim.label_smoothing": "smoothing labelsmoothing label_smooth",
        "train.global_batch train.micro_batch": "batch_size bs b batch global_batch_size train_batch_size "
        "total_batch_size batch_size_total",
        "train.micro_batch": "micro_batch_size per_device_batch_size per_device_train_batch_size batch_size_per_gpu "
        "batch_per_gpu mini_batch train_micro_batch_size_per_gpu gradient_accumulation_steps grad_accum accum_iter "
        "accumulation accumulation_steps accum_steps update_freq",
        "train.group": "group_size ghost_batch ghost_batch_size virtual_batch_size",
        "train.epochs": "num_epochs max_epochs n_epochs nb_epochs total_epochs num_train_epochs",
        "train.max_steps": "steps num_steps total_steps iterations iters max_iters max_iter train_steps",
        "train.seed": "random_seed manual_seed",
        "train.precision": "dtype amp mixed_precision bf16 fp16 fp32 half no_amp amp_dtype",
        "train.init_from": "pretrained finetune fine_tune load_from init_checkpoint load_pretrained weights",
        "train.compile": "torch_compile torchcompile torchscript",
        "train.recompute": "gradient_checkpointing grad_checkpointing activation_checkpointing remat "
        "checkpoint_activations use_checkpoint",
        "checkpoint.every_steps": "save_interval save_every save_freq save_steps save_every_steps checkpoint_interval "
        "ckpt_every ckpt_interval checkpointing_steps checkpoint_hist saveckp_freq",
        "checkpoint.keep": "save_total_limit keep_last max_checkpoints max_to_keep",
        "log.every_steps": "log_interval log_every log_freq print_freq logging_steps log_every_n_steps",
        "log.eval_every_epochs": "eval_interval eval_every eval_freq eval_steps val_interval val_freq test_freq",
        "log.profile_steps": "profile profiler profiling trace profile_freq enable_profiling",
        "cluster.gpus_per_node": "gpus num_gpus ngpus n_gpus gpus_per_machine",
        "cluster.nodes": "num_nodes nnodes n_nodes num_machines",
        "cluster.cpus_per_task": "cpus num_cpus cpus_per_gpu",
        "cluster.mem_gb": "mem memory",
        "cluster.time_min": "time walltime time_limit",
    }
)
"""A word -> the keys that mean it, the likeliest first."""

OPTIONS = _by_word(
    {
        "--arch": "model model_name network net recipe architecture size",
        "--config": "cfg config_file config_name yaml c f",
        "--data": "data_path data_dir dataset data_root dataset_dir imagenet_path root d",
        "--run-dir": "output_dir output out out_dir logdir log_dir save_dir work_dir workdir exp_dir experiment name "
        "exp_name job_dir project",
        "--init-from": "pretrained finetune fine_tune load_from init_checkpoint weights initial_checkpoint",
        "--set": "override overrides opts options cfg_options s",
        "--start-over": "overwrite force restart from_scratch no_resume",
        "--dry-run": "dryrun print_only show n debug test_only",
        "--ranks --gpus-per-node": "gpus num_gpus ngpus n_gpus nproc nproc_per_node num_processes world_size n_procs "
        "np devices",
        "--nodes": "num_nodes nnodes n_nodes num_machines N",
        "--tasks-per-node": "ntasks_per_node ntasks tasks",
        "--time": "walltime time_limit timeout t",
        "--partition": "queue p",
        "--account": "project a",
        "--mem-gb": "mem memory",
        "--cpus-per-task": "cpus num_cpus cpus_per_gpu",
        "--seeds": "random_seeds array",
        "--grid": "sweep grid_search search",
        "--after": "dependency depend afterok afterany",
        "--mail": "mail_user email",
        "--seed": "random_seed manual_seed",
        "--out": "output output_dir out_dir dest destination target save_dir",
        "--source": "input data_dir data data_path src root dir",
        "--workers": "num_workers n_workers nproc processes threads jobs j",
        "--short-side": "size resize img_size image_size",
        "--shard-samples": "maxcount shard_size samples_per_shard",
        "--val-fraction": "val_split validation_split val_ratio val_size",
        "--batch --micro-batch": "batch_size bs batch b global_batch train_batch_size",
        "--precision": "dtype amp fp16 bf16",
        "--device": "cpu cuda gpu",
    }
)
"""A word -> the options that mean it; of these, a program has what it has."""

NOT_NEEDED = {
    word: why
    for why, words in {
        "a run goes on by itself, from the newest checkpoint of its run folder: give the same command again, or that "
        "--run-dir; --start-over begins anew, and --init-from begins another run from its weights": "resume "
        "resume_from resume_from_checkpoint auto_resume resume_path ckpt checkpoint ckpt_path load load_checkpoint "
        "continue continue_from restore",
        "ranks find each other by themselves, and train with DeepSpeed's ZeRO-2 always": "local_rank rank dist_url "
        "dist_backend master_addr master_port deepspeed deepspeed_config distributed zero_stage zero fsdp launcher",
    }.items()
    for word in words.split()
}
"""A word -> why no setting and no option of a training has this meaning."""


def meant_keys(word: str, known: Iterable[str]) -> list[str]:
    """Returns the keys that a word means: those of this name, else those that other programs call so."""
    word = word.lower().replace("-", "_")
    return [key for key in known if key.rpartition(".")[2] == word] or list(KEYS.get(word, ()))
