"""OPO: on-policy reinforcement learning of language models with the optimal baseline.

Start with `loop.py`, the training loop on the host; `learner/update.py` is the update
on the device, and `advantages.py` holds the paper's estimator. `docs/glossary.md`
defines every name. Below a package, the map lists its modules.

    __main__         command line: parses the config, dispatches the command
    config           every setting, its flag and its limits
    loop             the training loop: sample, score, update, record
    run              context of a run: tokenizer, mesh, policy's shapes, seeds
    build            config -> policy, sampler, learner
    protocols        Sampler, Scorer, Learner: what a replacement implements
    problems         training stream and held-out problems
    scorer           rollouts -> rewards, overlapped with sampling
    sft              supervised fine-tuning before RL
    reward_training  preference pairs -> reward model
    commands         evaluate, export, sample from and measure a finished run
                     data evaluate export sample variance
    advantages       rewards, lengths, groups -> advantages         (the paper)
    losses           log-probs, advantages, mask -> loss
                     aggregation checks objectives ratios
    logprobs         hidden states, unembedding -> log-prob, entropy, energy
    rollouts         the batch that sampler, scorer and learner share
    metrics          times, rewards and lengths of a step
    variance         gradient variance of every estimator
                     estimates estimators gram measurement statistics tables
    sampler          prompts -> rollouts: SamplingParams, prefill, decode loop
                     batch decoding engine lowering params prefill schedule state tokens
    learner          rollouts, rewards -> next state: packing, update, optimiser
                     algorithm forward metrics optimizer packing state update
    models           one decoder for all families, Hugging Face format, LoRA
                     attention card config config_json flash hf lora rope transformer
    data             sources, mixtures, prompts, decontamination, embedded tasks
                     arithmetic builders decontaminate preferences prompts selection
                     sources stream
    rewards          math verifier, worker pool, shaping, reward model
                     answers custom early math_verifier normalization numeric pool
                     reward_model shaping
    evaluation       pass@k, maj@k, diversity, win rates, with intervals
                     diversity estimators evaluator graded responses summary tables
    devices          mesh, processes, memory, profiling, ahead-of-time programs
                     aot distributed environment memory profiling sharding
    storage          run directory, checkpoints, record of metrics and samples
                     checkpoint config_file directory json_files record run_json
    reports          figures, report.html, compare.html
                     charts compare plots report run_files style terminal
    planning         memory and time of a run on absent devices
                     command hlo jaxpr plan programs replication search simulation
                     topologies

Arrays inside models, sampler and learner end in their shape (`hidden_BTD`). One letter
has one meaning:

    B  rows of a batch; decoding slots    N  rollouts of a step
    T  tokens of a row; response tokens of a rollout
    W  columns of a packed row            U  its columns with a response token
    C  cache entries, each read by B / C consecutive rows
    P  prompt tokens                      G  prompts, each with a group of rollouts
    S  key positions attended to          M  tokens of the longest stop sequence
    D  model width                        F  MLP width
    H  query heads                        K  key-value heads
    R  query heads per K                  E  width of one head
    V  vocabulary                         L  layers

This module imports nothing, so `import opo_jax.losses` costs no more than JAX.
"""

__version__ = "0.1.0"
