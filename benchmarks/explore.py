"throwaway exploration"
import sys, json, time, os, torch, copy
from functools import partial
from qkrestore_nb.hypenet import *
from qkrestore_nb.training import *
from qkrestore_nb.experiment import *
from transformers import set_seed
a=json.loads(sys.argv[1]); name=a["name"]; seed=a["seed"]; OUT=os.environ["OUT"]
torch.set_float32_matmul_precision("high")
r=recipes["gpu"]; set_seed(seed)
fields={**model_fields,**r["model"],**a.get("model",{})}
m=init_weights(HypeNetForCausalLM(HypeNetConfig(**fields))).cuda()
t0=time.time()
pre=f"/tmp/pre-{a.get('pre',name)}.pt"
L={k:[(1024,64,1),(4096,64,1),(16384,24,1)] for k in ("S1","S2","S3")}
L["MK"]=[(1024,16,8),(4096,16,8),(16384,8,8)]
L["MF"]=[(1024,16,32),(2048,8,64),(4096,4,128),(16384,2,128)]
def show(tag,model,**kw):
    model.config.dtype=torch.float32
    s=evaluate(model,L,steps=(2,8),problems=128,device="cuda",seed=77)
    line={t:" ".join(f"{100*c['correct']/c['n']:.0f}" for c in v.values()) for t,v in s.items()}
    print(name,tag,f"{time.time()-t0:.0f}s",line,flush=True); return s
log=train(m,partial(pretraining_batch,seed=seed,**{**r["pretraining_data"],**a.get("pdata",{})}),dtype="bfloat16",workers=5,**{**r["pretraining"],**a.get("pretraining",{})},look=lambda s,mm: print(name,"pre",s,f"{time.time()-t0:.0f}s",flush=True) if s%800==0 else None)
print(name,"pretraining",f"{time.time()-t0:.0f}s",[(x["step"],round(x["loss"],3),x["tokens_per_s"]) for x in log[::10]]+[log[-1]["loss"]],flush=True)
m.eval(); res={"pre":show("pre",m)}
m.cpu().to(torch.bfloat16).save_pretrained("/tmp/p"); os.system(f"cp /tmp/p/model.safetensors {OUT}/{name}-pre.safetensors"); m.float().cuda()
p0={k:v.clone() for k,v in m.state_dict().items()}
for sft in a["sft"]:
    m.load_state_dict(p0); t1=time.time()
    log2=train(m,partial(sft_batch,seed=seed,**{**r["sft_data"],**sft.get("data",{})}),dtype="bfloat16",workers=5,**{**r["sft"],**{k:v for k,v in sft.items() if k!="data"}})
    m.eval(); print(name,"sft",sft,f"{time.time()-t1:.0f}s",log2[-1],flush=True)
    key=json.dumps(sft); res[key+"post"]=show(f"{sft} post",m)
    p1={k:v.clone() for k,v in m.state_dict().items()}
    soft=[i for i,t in enumerate(m.config.layer_types) if t=="full_attention"]
    for v,roles in (("qk","qk"),("vo","vo"),("k","k")):
        d=dict(p1)
        for i in soft:
            for x in roles: d[f"model.layers.{i}.self_attn.{x}_proj.weight"]=p0[f"model.layers.{i}.self_attn.{x}_proj.weight"]
        m.load_state_dict(d); res[key+v]=show(f"{sft} {v}",m)
    m.load_state_dict({k:.9*p1[k]+.1*p0[k] for k in p0}); res[key+"wise"]=show(f"{sft} wise.9",m)
json.dump(dict(a=a,log=log,res=res),open(f"{OUT}/{name}.json","w"))
