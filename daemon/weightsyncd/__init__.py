"""weightsyncd: the service that runs on each node. Start it with `weightsyncd --node-config node.toml`.

The server and its sockets
    __main__        the command line
    server          sockets in front, bridges and engines behind, at most one push at a time in between
    reception       what arrives at a socket: whom it is for, and an answer to everyone who asks

A push here
    trainers        who may push now, who has to wait, and what becomes of each call
    waiting         calls of `push_weights` that wait for the node to be free
    turns           which of them begins the next push
    refusals        calls that come to nothing, and who is told
    failures        pushes that failed before all their ranks had called
    push            one push: events to its session, instructions to whoever carries them out
    context         what one node knows of a push under way
    push_engines    which engines a push is for
    ranks           its trainer ranks: which have called, where, and how each is reached
    rank_messages   each message of a rank, and what the session hears of it
    rank_weights    what ranks tell of their weights: fingerprints, and where they lie
    planning        the plan of one push
    plans           layouts and plans that were seen before
    outcomes        outcome and progress of a push, as ranks and operators are told
    repeats         the last push once more, to engines that come late

A push led elsewhere
    follower        this node's part in a push that another daemon coordinates
    hold            holds this node for that push, and lets go of it
    held_push       that push, and what this node is doing for it
    follower_rails  what this node's bridges do on rails for it
    branch          this node's ranks in it
    remote_calls    calls of other nodes for ranks that are here

Between nodes
    peers           other nodes: attached, asked, lost
    claims          nodes that a push is for, held for it before it begins
    seed            the node that tells the others of each other
    rails           communicators between bridges, and which node forms them
    joining         this node's bridges become members of rails that others form
    relays          a bridge broadcasts a bucket to other nodes
    exchanges       bridges of several nodes give one another their parts of a bucket
    delivery        weights straight into places of engines of other nodes

This node's engines and bridges
    executor        instructions → this node's engines and bridges
    engines         engines, and what is known of each between pushes
    exports         slots as engines are given them: offers, exports, fences
    loras           LoRA adapters on their way to engines
    keeper          the process that keeps the last push in host memory
    bridges         bridge processes: started, watched, replaced
    bridge_link     one bridge process, from its start to its end
    orphans         bridges that outlived their daemon

Operating
    status          the answer to `weightsync status`
    metrics         the metrics for Prometheus
    health          measures them; the pages /metrics and /healthz
    traces          traces of pushes, for `weightsync trace`
    changes         engines and peers as operators change them: a command, or an edited config
    membership      engines and nodes that come and go between pushes
"""
