"""OPO: on-policy reinforcement learning of language models with the optimal baseline.

Start with `loop.py`, the training loop on the host; `learner/update.py` is the update
on the device, and `advantages.py` holds the paper's estimator. `docs/glossary.md`
defines every name.

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
    advantages       rewards, lengths, groups -> advantages         (the paper)
    losses           log-probs, advantages, mask -> loss
    logprobs         hidden states, unembedding -> log-prob, entropy, energy
    rollouts         the batch that sampler, scorer and learner share
    metrics          times, rewards and lengths of a step
    variance         gradient variance of every estimator
    sampler          prompts -> rollouts: SamplingParams, prefill, decode loop
    learner          rollouts, rewards -> next state: packing, update, optimiser
    models           one decoder for all families, Hugging Face format, LoRA
    data             sources, mixtures, prompts, decontamination, embedded tasks
    rewards          math verifier, worker pool, shaping, reward model
    evaluation       pass@k, maj@k, diversity, win rates, with intervals
    devices          mesh, processes, memory, profiling, ahead-of-time programs
    storage          run directory, checkpoints, record of metrics and samples
    reports          figures, report.html, compare.html
    planning         memory and time of a run on absent devices

Arrays inside models, sampler and learner end in their shape (`hidden_BTD`). One letter
has one meaning:

    B  rows of a batch          N  rollouts of a step
    T  tokens of a row; response tokens of a rollout
    S  key positions attended to
    P  prompt tokens            G  prompts, each with a group of rollouts
    D  model width              F  MLP width              V  vocabulary
    H  query heads              K  key-value heads        R  query heads per K
    E  width of one head        L  layers

The update's plan packs responses: there R counts rows, W their columns, C the columns
that hold responses, and E the prompts, each of which some rows share.

This module imports nothing, so `import opo_jax.losses` costs no more than JAX.
"""

__version__ = "0.1.0"
