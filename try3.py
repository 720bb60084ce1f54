import sys,time
import numpy as np, keras
from proto import kl
from keras import ops
from keras_woodfisher_backends.keras_internals.models import infer
from keras_woodfisher.gradients.loss import forward_only
from keras_woodfisher.options.pruning_options import PruningOptions
from keras_woodfisher.pruning.pruner import Pruner
from keras_woodfisher.oneshot.reconstruction.layerwise import Layerwise
from keras_woodfisher.oneshot.reconstruction.allocation import Allocation,candidates,_uniform
S="/work/shared/"
model=keras.models.load_model(S+"models/resnet20_cifar10.keras",compile=False)
tr=np.load(S+"data/cifar10_train12k.npz"); va=np.load(S+"data/cifar10_val5k.npz")
perm=np.random.default_rng(int(sys.argv[3]) if len(sys.argv)>3 else 0).permutation(12000)
vx,vy=va["x"].astype("float32"),va["y"].ravel()
hx=tr["x"][perm[-1000:]].astype("float32"); hy=tr["y"].ravel()[perm[-1000:]]
x=tr["x"][perm[:int(sys.argv[1])]].astype("float32")
dense=model.get_weights()
def logits(x):
    with forward_only(): return np.concatenate([ops.convert_to_numpy(infer(model,ops.convert_to_tensor(x[i:i+500]))) for i in range(0,len(x),500)])
hd=logits(hx)
for s in map(float,sys.argv[2].split(",")):
    model.set_weights(dense)
    pruner=Pruner(model,PruningOptions(verbose=0)); pruner.find_zeros()
    c=candidates(pruner,[s]*22)
    z=[np.array(list(a.zeros.values())) for a in c.values()]; size=np.array([t.size for t in pruner.targets])
    km,ku=size-z[0],size-z[1]
    def norm(k,total):
        f=1.0
        for _ in range(60):
            q=np.minimum(size,k*f); f*=total/q.sum()
        q=np.minimum(size,np.floor(k*f)).astype(int); q[np.argsort(-(k*f-q))[:total-q.sum()]]+=1
        return q
    tot=km.sum()
    allocs={"mag":km,"uni":ku,"geo":norm(np.sqrt(km*ku),tot),"geo.75":norm(km**.75*ku**.25,tot)}
    lw=Layerwise(model,pruner.targets,[x],0,2**35,'t')
    for name,k in allocs.items():
        model.set_weights(dense)
        r=lw.run(Allocation(pruner,[int(v) for v in size-k]))
        for t,kk in zip(pruner.targets,r.kernels): t.variable.assign(kk)
        hp=logits(hx); vp=logits(vx)
        sub=slice(0,100)
        print(s,name,"KL",round(kl(hd,hp),4),"mse",round(float(((hd-hp)**2).mean()/hd.var(0).mean()),4),"KL100",round(kl(hd[sub],hp[sub]),4),"val",round(100*(vp.argmax(1)==vy).mean(),2),"held",100*(hp.argmax(1)==hy).mean(),flush=True)
